"""Attend on shapes as the fused kernels do, which keep no matrix of scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

__all__ = ["fused_attention"]


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Inside the block, `scaled_dot_product_attention` of shapes is the CPU's fused kernel where that can run.

    On the meta device, torch makes this function of plain products. That is right for counting operations and wrong for
    memory, since each head would hold a matrix of scores. As on a CPU, plain products stay for dropout, and for keys
    and values of different widths. The block replaces the function in its module, because that is where every part of
    every model looks it up, also in layers that gradient checkpointing computes again.
    """
    attend = nnf.scaled_dot_product_attention

    def attend_fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if not query.is_meta or dropout_p or query.ndim != 4 or query.shape[-1] != value.shape[-1]:
            return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # the kernel takes numbers that it adds
            attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]

    nnf.scaled_dot_product_attention = attend_fused
    try:
        yield
    finally:
        nnf.scaled_dot_product_attention = attend
