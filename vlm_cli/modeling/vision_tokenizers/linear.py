"""Projections of each patch: linear (LLaVA, https://arxiv.org/abs/2304.08485) and MLP (LLaVA-1.5,
https://arxiv.org/abs/2310.03744).

B batch, T_img media, F frames, v patches, n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm_cli.composition import LinearOptions

__all__ = ["LinearProjection", "MLPProjection"]


class LinearProjection(nn.Module):
    """Map each patch to one vision token; the frames of a video follow each other, or are averaged.

    Args:
        options: what becomes of frames.
        dim_in: channels of the features.
        num_patches: patches of one frame.
        dim_out: channels of the tokens; None keeps `dim_in`.
    """

    def __init__(self, options: LinearOptions, dim_in: int, num_patches: int, dim_out: int | None = None) -> None:
        super().__init__()
        self.frames = options.frames
        self.num_patches = num_patches
        self.dim_out = dim_in if dim_out is None else dim_out
        self.proj = self.build(dim_in, self.dim_out)

    @staticmethod
    def build(dim_in: int, dim_out: int) -> nn.Module:
        return nn.Linear(dim_in, dim_out)

    def num_tokens(self, num_frames: int = 1) -> int:
        return self.num_patches * (num_frames if self.frames == "concatenate" else 1)

    def token_mask(self, frame_mask: Tensor) -> Tensor:
        """bool[B, T_img, F] -> bool[B, T_img, n]: the patches of the frames that are there."""
        if self.frames == "mean":
            return frame_mask.any(-1, keepdim=True).expand(-1, -1, self.num_patches)
        return frame_mask.repeat_interleave(self.num_patches, dim=-1)

    def forward(self, features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """float[B, T_img, F, v, dim_in] -> float[B, T_img, n, dim_out]."""
        if self.frames == "concatenate":
            return self.proj(features.flatten(2, 3))
        if frame_mask is None:
            return self.proj(features.mean(2))
        there = frame_mask[..., None, None]  # [B, T_img, F, 1, 1]
        total = torch.where(there, features, 0).sum(2)
        return self.proj(total / there.sum(2).clamp(min=1))


class MLPProjection(LinearProjection):
    """Map each patch through two linear layers with a GELU between."""

    @staticmethod
    def build(dim_in: int, dim_out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(dim_in, dim_out), nn.GELU(), nn.Linear(dim_out, dim_out))
