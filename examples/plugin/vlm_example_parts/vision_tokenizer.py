"""A vision tokenizer. B batch, T_img media, F frames, v patches, n vision tokens of a medium."""

from __future__ import annotations

from math import isqrt

from torch import Tensor, nn

from vlm_cli.errors import CompositionError
from vlm_example_parts import GridPoolingOptions


class GridPooling(nn.Module):
    """Average the grid of patches to side × side, and map each average to a vision token.

    Args:
        options: the side of the pooled grid.
        dim_in: channels of the features.
        num_patches: v, of one frame.
        dim_out: channels of the tokens; None keeps `dim_in`.
    """

    def __init__(self, options: GridPoolingOptions, dim_in: int, num_patches: int, dim_out: int | None = None) -> None:
        super().__init__()
        self.grid = isqrt(num_patches)
        if self.grid**2 != num_patches:
            raise CompositionError(f"vision tokenizer 'grid-pooling' needs a square of patches, got {num_patches}.")
        self.dim_out = dim_in if dim_out is None else dim_out
        self.num_per_frame = options.side**2
        self.pool = nn.AdaptiveAvgPool2d(options.side)
        self.proj = nn.Linear(dim_in, self.dim_out)

    def num_tokens(self, num_frames: int = 1) -> int:
        """Count the vision tokens of a medium."""
        return self.num_per_frame * num_frames

    def token_mask(self, frame_mask: Tensor) -> Tensor:
        """Mark the tokens of valid frames: bool[B, T_img, F] -> bool[B, T_img, n]."""
        return frame_mask.repeat_interleave(self.num_per_frame, dim=-1)

    def forward(self, features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """float[B, T_img, F, v, dim_in] -> float[B, T_img, n, dim_out]; frames do not mix, so no mask is needed."""
        frames = features.flatten(0, 2).transpose(1, 2)  # [B·T_img·F, dim_in, v]
        pooled = self.pool(frames.unflatten(2, (self.grid, self.grid))).flatten(2).transpose(1, 2)
        return self.proj(pooled.unflatten(0, features.shape[:3]).flatten(2, 3))
