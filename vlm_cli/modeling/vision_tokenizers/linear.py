"""Projections of each patch: linear (LLaVA, https://arxiv.org/abs/2304.08485) and MLP (LLaVA-1.5,
https://arxiv.org/abs/2310.03744).

B batch, T_img media, F frames, v patches, n tokens, d channels.
"""

from __future__ import annotations

from math import isqrt

import torch
from einops import rearrange
from torch import Tensor, nn

from vlm_cli.composition import LinearOptions
from vlm_cli.errors import CompositionError

__all__ = ["LinearProjection", "MLPProjection", "pixel_shuffle"]


def pixel_shuffle(features: Tensor, s: int) -> Tensor:
    """Make one patch of each square of s×s neighbours; v is a square, row after row.

    The channels of a square's patches follow each other, row after row too (nanoVLM, `ModalityProjector`). With s = 2,

        0  1  2  3
        4  5  6  7      gives   [0 1 4 5] [2 3 6 7] [8 9 12 13] [10 11 14 15]
        8  9 10 11
        12 13 14 15

    Args:
        features: float[*, v, d].
        s: divides the side of the square.

    Returns:
        float[*, v/s², s²·d].
    """
    side = isqrt(features.shape[-2])
    return rearrange(features, "... (h a w b) d -> ... (h w) (a b d)", h=side // s, a=s, b=s)


class LinearProjection(nn.Module):
    """Map each patch to one vision token. A video gives the tokens of all its frames, or their mean.

    Args:
        options: settings.
        dim_in: channels of the features.
        num_patches: patches of one frame.
        dim_out: channels of the tokens; None keeps `dim_in`.

    Raises:
        CompositionError: if `pixel_shuffle` does not divide a square of patches.
    """

    #: A medium's tokens depend on nothing else in its row.
    encodes_media_independently = True

    def __init__(self, options: LinearOptions, dim_in: int, num_patches: int, dim_out: int | None = None) -> None:
        super().__init__()
        self.frames = options.frames
        self.pixel_shuffle = s = options.pixel_shuffle
        side = isqrt(num_patches)
        if s > 1 and (side**2 != num_patches or side % s):
            raise CompositionError(
                f"vision_tokenizer.pixel_shuffle={s} does not fit: it needs a square of patches whose side is a "
                f"multiple of {s}, and the vision encoder gives {num_patches} features. Choose another image_size, or "
                "leave out class_token."
            )
        self.num_patches = num_patches // s**2  # as they are projected
        self.dim_out = dim_in if dim_out is None else dim_out
        self.proj = self.build(s**2 * dim_in, self.dim_out, options.bias)

    @staticmethod
    def build(dim_in: int, dim_out: int, bias: bool) -> nn.Module:
        return nn.Linear(dim_in, dim_out, bias=bias)

    def num_tokens(self, num_frames: int = 1) -> int:
        """Count the vision tokens of a medium of so many frames."""
        return self.num_patches * (num_frames if self.frames == "concatenate" else 1)

    def token_mask(self, frame_mask: Tensor) -> Tensor:
        """Mark the tokens of frames that are not padding: bool[B, T_img, F] -> bool[B, T_img, n]."""
        if self.frames == "mean":
            return frame_mask.any(-1, keepdim=True).expand(-1, -1, self.num_patches)
        return frame_mask.repeat_interleave(self.num_patches, dim=-1)

    def forward(self, features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """float[B, T_img, F, v, dim_in] -> float[B, T_img, n, dim_out]."""
        if self.pixel_shuffle > 1:
            features = pixel_shuffle(features, self.pixel_shuffle)
        if self.frames == "concatenate":
            return self.proj(features.flatten(2, 3))
        if frame_mask is None:
            return self.proj(features.mean(2))
        is_valid = frame_mask[..., None, None]  # [B, T_img, F, 1, 1]
        total = torch.where(is_valid, features, 0).sum(2)  # [B, T_img, v, dim_in]
        return self.proj(total / is_valid.sum(2).clamp(min=1))


class MLPProjection(LinearProjection):
    """Map each patch through two linear layers with a GELU between."""

    @staticmethod
    def build(dim_in: int, dim_out: int, bias: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(dim_in, dim_out, bias=bias), nn.GELU(), nn.Linear(dim_out, dim_out, bias=bias))
