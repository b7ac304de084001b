"""Projections of each patch: linear (LLaVA, https://arxiv.org/abs/2304.08485) and MLP (LLaVA-1.5,
https://arxiv.org/abs/2310.03744), with what later models do before and after the map.

B batch, T_img media, F frames, v patches, n tokens, d channels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from vlm_cli.composition import LinearOptions, MLPOptions
from vlm_cli.modeling.layers import linear_maps, make_norm
from vlm_cli.modeling.vision_tokenizers.grid import (
    Grid,
    convolve,
    make_convolutions,
    merge_sizes,
    pixel_shuffle,
    pool,
    whole_grid,
)

__all__ = ["LinearProjection", "MLPProjection", "pixel_shuffle"]


class LinearProjection(nn.Module):
    """Map each patch to one vision token. A video gives the tokens of all its frames, or their mean.

    Args:
        options: settings.
        dim_in: channels of the features.
        num_patches: features of one frame.
        dim_out: channels of the tokens; None keeps `dim_in`.
        grid: rows and columns of patches; None for a square.

    Raises:
        CompositionError: if `pixel_shuffle`, `pool` or `convolutions` does not fit the grid of patches.
    """

    #: A medium's tokens depend on nothing else in its row.
    encodes_media_independently = True

    def __init__(
        self,
        options: LinearOptions,
        dim_in: int,
        num_patches: int,
        dim_out: int | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        self.frames, self.pixel_shuffle = options.frames, options.pixel_shuffle
        self.grid = self._find_grid(num_patches, grid)  # of the patches
        self.mapped_grid, self.token_grid = self._find_merged_grids()
        self.num_patches = num_patches if self.token_grid is None else self.token_grid[0] * self.token_grid[1]
        self.dim_out = dim_in if dim_out is None else dim_out
        dim_mapped = self.dim_out if options.convolutions else options.pixel_shuffle**2 * dim_in
        width = {"patches": dim_in, "before": dim_mapped, "after": self.dim_out}[options.norm_at]
        self.norm = make_norm(options.norm, width, options.norm_eps)
        self.convolutions = make_convolutions(options.convolutions, dim_in, dim_mapped)
        self.proj = self.build(dim_mapped, self.dim_out, options)

    def _find_grid(self, num_patches: int, grid: Grid | None) -> Grid | None:
        """Return the grid of patches; None if nothing merges neighbours and the features are no known grid."""
        for setting, unset in (("pixel_shuffle", 1), ("pool", 1), ("convolutions", 0)):
            if getattr(self.options, setting) > unset:
                return whole_grid(setting, num_patches, grid)
        return grid if grid is not None and grid[0] * grid[1] == num_patches else None

    def _find_merged_grids(self) -> tuple[Grid | None, Grid | None]:
        """Return the grids of one frame at the map and after it; None if the features are no known grid."""
        options, grid = self.options, self.grid
        if grid is None:
            return None, None
        pooled = partial(merge_sizes, "pool", options.pool, rounds_up=options.pool_by == "bilinear")
        if options.pixel_shuffle > 1:
            grid = merge_sizes("pixel_shuffle", options.pixel_shuffle, grid, rounds_up=options.pad)
        elif options.convolutions:
            grid = merge_sizes("convolutions", 2**options.convolutions, grid, rounds_up=True)
        elif options.pool_at == "before":
            grid = pooled(grid)
        return grid, grid if options.pool_at == "before" else pooled(grid)

    @staticmethod
    def build(dim_in: int, dim_out: int, options: LinearOptions) -> nn.Module:
        return nn.Linear(dim_in, dim_out, bias=options.bias)

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
        options = self.options
        merged = self.merge(self.norm(features) if options.norm_at == "patches" else features)
        if self.frames == "concatenate":
            return self.map(merged).flatten(2, 3)
        return self.map(_mean_over_frames(merged, frame_mask))

    def merge(self, features: Tensor) -> Tensor:
        """Merge neighbouring patches before the map: float[*, v, dim_in] -> float[*, v', s²·dim_in]."""
        options = self.options
        if options.pixel_shuffle > 1:
            return pixel_shuffle(features, options.pixel_shuffle, self.grid, options.shuffle_order)
        if options.convolutions:
            assert self.grid is not None  # checked when it was made
            return convolve(features, self.convolutions, self.grid)
        if options.pool > 1 and options.pool_at == "before":
            assert self.grid is not None
            return pool(features, options.pool, self.grid, options.pool_by)
        return features

    def map(self, merged: Tensor) -> Tensor:
        """Map the merged patches: float[*, v', s²·dim_in] -> float[*, tokens of one frame, dim_out]."""
        options = self.options
        tokens = self.proj(self.norm(merged) if options.norm_at == "before" else merged)
        if options.norm_at == "after":
            tokens = self.norm(tokens)
        if options.pool > 1 and options.pool_at == "after":
            assert self.mapped_grid is not None
            tokens = pool(tokens, options.pool, self.mapped_grid, options.pool_by)
        return tokens if options.scale == 1 else tokens * options.scale


def _mean_over_frames(features: Tensor, frame_mask: Tensor | None) -> Tensor:
    """float[B, T_img, F, v, d], bool[B, T_img, F] -> float[B, T_img, v, d], of the frames that are not padding."""
    if frame_mask is None:
        return features.mean(2)
    is_valid = frame_mask[..., None, None]  # [B, T_img, F, 1, 1]
    total = torch.where(is_valid, features, 0).sum(2)  # [B, T_img, v, d]
    return total / is_valid.sum(2).clamp(min=1)


class MLPProjection(LinearProjection):
    """Map each patch through linear layers with an activation between; by default two with a GELU."""

    @staticmethod
    def build(dim_in: int, dim_out: int, options: LinearOptions) -> nn.Module:
        assert isinstance(options, MLPOptions)
        hidden = dim_out if options.dim_hidden is None else options.dim_hidden
        dims = [dim_in, hidden, *[dim_out] * (options.map_depth - 1)]
        eps = options.norm_eps
        return linear_maps(dims, options.activation, bias=options.bias, norm=options.hidden_norm, norm_eps=eps)
