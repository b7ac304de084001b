"""Compute attention in float32 while everything else runs in bfloat16, where that is faster.

On the CPU, flash attention takes twice as long in bfloat16 as in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

__all__ = ["float32_attention"]


@contextlib.contextmanager
def float32_attention() -> Iterator[None]:
    """Inside the block, attend in float32 under bfloat16 autocast on the CPU.

    The block replaces `torch.nn.functional.scaled_dot_product_attention` for the whole process, because that is the
    only place where every part of every model looks the function up. A `TorchFunctionMode` would reach neither into
    `nn.MultiheadAttention` nor into the layers that gradient checkpointing computes again.
    """
    attend = nnf.scaled_dot_product_attention

    def attend_in_float32(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return attend(*map(_to_float32, args), **{key: _to_float32(x) for key, x in kwargs.items()})

    nnf.scaled_dot_product_attention = attend_in_float32
    try:
        yield
    finally:
        nnf.scaled_dot_product_attention = attend


def _to_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
