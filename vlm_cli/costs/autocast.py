"""Compute on shapes in bfloat16, as `torch.autocast` does on numbers: torch has no autocast for the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

__all__ = ["bfloat16_products"]

_NAMES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (nnf, ("linear", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention")),
    (torch, ("matmul", "bmm", "baddbmm", "mm", "addmm", "conv1d", "conv2d", "conv3d")),
    (Tensor, ("matmul", "bmm", "mm", "__matmul__")),
)


@contextlib.contextmanager
def bfloat16_products() -> Iterator[Callable[[], None]]:
    """Inside the block, products of shapes are computed in bfloat16, from copies of weights that are made once.

    These are the operations that autocast lowers on a CPU and on a GPU. On a GPU it also raises norms and softmax to
    float32; here they compute in the dtype that they get.

    Yields:
        What drops the copies and makes new ones at each use from then on: a backward pass finds none of autocast's.
    """
    keeps = True
    copies: dict[int, Tensor] = {}  # by the number of the weight, which lives longer than the block

    def lower(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_meta or x.dtype != torch.float32:
            return x
        if not (keeps and x.is_leaf and x.requires_grad):
            return x.bfloat16()
        if id(x) not in copies:
            copies[id(x)] = x.bfloat16()
        return copies[id(x)]

    def forget() -> None:
        nonlocal keeps
        keeps = False
        copies.clear()

    def lowered(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*map(lower, args), **{name: lower(x) for name, x in kwargs.items()})

        return call

    with contextlib.ExitStack() as stack:
        for owner, names in _NAMES:
            for name in names:
                before = getattr(owner, name)
                setattr(owner, name, lowered(before))
                stack.callback(setattr, owner, name, before)
        yield forget
