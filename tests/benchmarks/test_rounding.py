"""Two ways to run a model in bfloat16: rounding explains where they part, and a fault is no rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks.speed.rounding import Parting, find_parting, write
from tests.support import seed_torch, tiny
from vlm_cli.modeling.decoding import static

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8}
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


def partings(fusion: str, **other: Any) -> list[Parting]:
    model = copy.deepcopy(tiny.open_gates(tiny.build(fusion=fusion))).to(torch.bfloat16)
    found = []
    for seed in range(3):
        seed_torch(seed)
        inputs = tiny.batch(model, (1,))
        inputs["vision_x"] = torch.randn_like(inputs["vision_x"]).to(torch.bfloat16)
        plain = write(model, inputs, **OPTIONS)
        found.append(find_parting(model, inputs, plain, write(model, inputs, **OPTIONS, **other)))
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("fusion", ["cross-attention", "language-stream"])
def test_a_static_step_parts_by_rounding_alone(fusion, monkeypatch):
    found = partings(fusion, **STATIC)
    assert all(x.is_rounding and x.plain > 0 for x in found), list(map(str, found))
    begin = static.StaticStep.begin

    def late(step: static.StaticStep, kwargs: dict[str, Any]) -> None:
        begin(step, {**kwargs, "position_ids": kwargs["position_ids"] + 1})

    monkeypatch.setattr(static.StaticStep, "begin", late)
    broken = partings(fusion, **STATIC)
    assert not any(x.is_rounding for x in broken), list(map(str, broken))
