"""Modules on the meta device: their weights are not filled, and those on other devices are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.support import seed_torch, tiny
from vlm_cli.modeling import meta
from vlm_cli.modeling.meta import SkipsFilling, meta_device
from vlm_cli.modeling.towers import build_tower


@pytest.mark.parametrize("vision", ["vit", "siglip", "convnext"])
def test_towers_have_the_tensors_that_they_have_elsewhere(vision: str) -> None:
    with meta_device():
        empty = build_tower(tiny.VISION[vision])
    found, expected = empty.state_dict(), tiny.tower(vision).state_dict()
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in expected.items()
    }
    assert all(x.is_meta for x in empty.parameters())


def test_other_tensors_are_filled() -> None:
    def make() -> nn.Linear:
        seed_torch(0)
        return nn.Linear(3, 4)

    expected = make()
    with SkipsFilling():
        found = make()
    assert torch.equal(found.weight, expected.weight) and torch.equal(found.bias, expected.bias)


class Spy(TorchFunctionMode):
    """Keeps the functions that it sees, as a mode outside of others does."""

    def __init__(self) -> None:
        self.calls: set[object] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.add(func)
        return func(*args, **(kwargs or {}))


def test_meta_tensors_are_not_filled() -> None:
    with Spy() as ours, meta_device():
        nn.Linear(3, 4)
    assert not ours.calls & meta._FILLING
    with Spy() as torchs, torch.device("meta"):  # the twin: torch alone fills them
        nn.Linear(3, 4)
    assert torchs.calls & meta._FILLING
