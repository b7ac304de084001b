"""Gated cross-attention from the components of Llama's layers (IDEFICS, https://arxiv.org/abs/2306.16527).

The arithmetic is that of `IdeficsGatedCrossAttentionLayer` and `MllamaCrossAttentionDecoderLayer` of Transformers.
B batch, T_txt text positions, S attended positions, d channels; inside attention h heads of queries, g heads of keys
and values, k head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from vlm_cli.composition import LlamaCrossAttentionOptions
from vlm_cli.modeling.fusion.cross_attention import (
    GatedCrossAttention,
    GatedCrossAttentionBlock,
    VLMWithCrossAttention,
)
from vlm_cli.modeling.fusion.visibility import MediaVisibility, attend_to_media

__all__ = ["LlamaGatedCrossAttention", "VLMWithLlamaCrossAttention"]


class LlamaCrossAttention(nn.Module):
    """Attend from text to vision tokens, with four projections without biases and without rotary positions."""

    def __init__(self, options: LlamaCrossAttentionOptions, dim: int, dim_media: int) -> None:
        super().__init__()
        self.head_dim = options.head_dim
        inner = options.num_heads * options.head_dim
        inner_kv = (options.num_kv_heads or options.num_heads) * options.head_dim
        self.norm = nn.RMSNorm(dim, eps=options.norm_eps)
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim_media, inner_kv, bias=False)
        self.v_proj = nn.Linear(dim_media, inner_kv, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(options.head_dim, eps=options.norm_eps) if options.qk_norm else nn.Identity() for _ in range(2)
        )

    def _split(self, x: Tensor) -> Tensor:
        """Split channels into heads: float[B, T, h·k] -> float[B, h, T, k]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project(self, media: Tensor) -> Tensor:
        """Compute keys and values of vision tokens: float[B, S, dim_media] -> float[B, 2, g, S, k]."""
        k, v = self._split(self.k_proj(media)), self._split(self.v_proj(media))
        return torch.stack([self.k_norm(k), v], dim=1)

    def forward(self, x: Tensor, keys_values: Tensor, visibility: MediaVisibility) -> Tensor:
        """float[B, T_txt, dim], float[B, 2, g, S, k] -> float[B, T_txt, dim]."""
        q = self.q_norm(self._split(self.q_proj(self.norm(x))))
        return self.o_proj(attend_to_media(q, keys_values, visibility))


class SwiGLU(nn.Module):
    """RMSNorm, then `down(silu(gate(x))·up(x))` without biases (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, dim_ff: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.gate_proj = nn.Linear(dim, dim_ff, bias=False)
        self.up_proj = nn.Linear(dim, dim_ff, bias=False)
        self.down_proj = nn.Linear(dim_ff, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """float[B, T_txt, dim] -> float[B, T_txt, dim]."""
        x = self.norm(x)
        return self.down_proj(nnf.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaGatedCrossAttention(GatedCrossAttention):
    """All blocks of a language model."""

    @staticmethod
    def build_block(options: LlamaCrossAttentionOptions, dim: int, dim_media: int) -> GatedCrossAttentionBlock:
        return GatedCrossAttentionBlock(
            LlamaCrossAttention(options, dim, dim_media),
            SwiGLU(dim, options.dim_ff, options.norm_eps),
            gate_size=dim if options.gate == "vector" else 1,
        )


class VLMWithLlamaCrossAttention(VLMWithCrossAttention):
    """Gated cross-attention with blocks made like Llama's layers (IDEFICS)."""

    _fusion_class = LlamaGatedCrossAttention
