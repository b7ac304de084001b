"""`Arrangement`: the vision tokens of a picture's tiles as one grid, in the order in which a language model reads them.

Source: LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next/) and LLaVA-OneVision
(https://arxiv.org/abs/2408.03326, section 3.2). A picture of 1 x 2 tiles, each of 2 x 2 vision tokens, and the whole
picture first:

    views        W W    1 1  2 2         read as    W W W W   1 1 2 2 |   3 3 4 4 |      | is the learned newline
                 W W    3 3  4 4

B batch, T_img media per row, F views per medium, v vision tokens per view, n vision tokens per medium, d channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

from vlm_cli.composition import AnyresOptions
from vlm_cli.errors import CompositionError
from vlm_cli.modeling.batching import stack_media
from vlm_cli.modeling.deduplicate import moved
from vlm_cli.modeling.vision_tokenizers.grid import merge_sizes, pool
from vlm_cli.tiling import MediumSize
from vlm_cli.tiling.anyres import unpad

__all__ = ["Arrangement", "make_arrangement"]


class Arrangement(nn.Module):
    """Put the tiles of each picture side by side, as they lie in it. It has no parameter but the newline.

    Args:
        options: `AnyresOptions` of the composition.
        grid: (rows, columns) of the vision tokens of one view.
        dim: channels of the vision tokens.

    Attributes:
        per_frame: vision tokens of a frame of a clip, after pooling.
        pools_patches: whether the patches of clips are pooled before the vision tokenizer.
    """

    def __init__(self, options: AnyresOptions, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.options = options
        self.grid = grid
        rounds_up = options.clip_pool_by == "bilinear"
        rows, columns = merge_sizes("clip_pool", options.clip_pool, grid, rounds_up=rounds_up)
        self.per_frame = rows * columns
        self.pools_patches = options.clip_pool > 1 and options.clip_pool_at == "before"
        self.newline = nn.Parameter(torch.empty(dim)) if options.newline else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the newline from N(0, 1/d), as LLaVA-NeXT does."""
        if self.newline is not None:
            nn.init.normal_(self.newline, std=len(self.newline) ** -0.5)

    def num_tokens(self, size: MediumSize) -> int:
        """Count the vision tokens of a medium after the arrangement."""
        per_view = self.grid[0] * self.grid[1]
        if not size.rows:
            return size.num_frames * self.per_frame + (self.newline is not None and self.options.clip_newline)
        height, width = unpad(self.options, size, self.grid).shape
        return height * (width + (self.newline is not None)) + per_view * size.has_thumbnail

    def pool(self, patches: Tensor) -> Tensor:
        """Merge neighbours in the frames of a clip: float[*, v, d] -> float[*, per_frame, d]."""
        return pool(patches, self.options.clip_pool, self.grid, self.options.clip_pool_by)

    def forward(self, tokens: Tensor, token_mask: Tensor, vision_grid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Arrange the vision tokens of all media.

        Args:
            tokens: float[B, T_img, F·v, d], view after view; of a clip whose patches were pooled, its own first.
            token_mask: bool[B, T_img, F·v], true for tokens of views that are not padding.
            vision_grid: int[B, T_img, 4], see `VLM.encode_vision`; None for media without tiles.

        Returns:
            float[B, T_img, n, d] tokens, and bool[B, T_img, n], true for tokens that are not padding.
        """
        per_view = self.grid[0] * self.grid[1]
        views = (token_mask.sum(-1) // per_view).tolist()  # [B][T_img], number of views of each medium
        grids = [[(0, 0, 0, 0)] * len(row) for row in views] if vision_grid is None else vision_grid.tolist()
        arranged = [
            [
                self.arrange(
                    medium[: num * self.per_frame] if self._is_pooled(grid) else _valid(medium, mask),
                    MediumSize(num, *grid),
                )
                for medium, mask, num, grid in zip(media, masks, row, row_grids, strict=True)
                if num
            ]
            for media, masks, row, row_grids in zip(tokens, token_mask, views, grids, strict=True)
        ]
        found, _ = stack_media(arranged, shape=(tokens.shape[-1],))
        mask = token_mask.new_zeros(found.shape[:3])
        for b, row in enumerate(arranged):
            for t, medium in enumerate(row):
                mask[b, t, : len(medium)] = True
        missing = tokens.shape[1] - found.shape[1]  # media that are padding in every row
        return nnf.pad(found, (0, 0, 0, 0, 0, missing)), nnf.pad(mask, (0, 0, 0, missing))

    def arrange(self, tokens: Tensor, size: MediumSize) -> Tensor:
        """Arrange the vision tokens of one medium: float[F·v, d] -> float[n, d]."""
        if not size.rows:
            return self._arrange_clip(tokens, size.num_frames)
        tiles = size.rows * size.columns * self.grid[0] * self.grid[1]
        if self.options.thumbnail == "first":
            whole, tokens = tokens[:-tiles], tokens[-tiles:]
        else:
            tokens, whole = tokens[:tiles], tokens[tiles:]
        picture = rearrange(
            tokens, "(R C h w) d -> (R h) (C w) d", R=size.rows, C=size.columns, h=self.grid[0], w=self.grid[1]
        )
        kept = unpad(self.options, size, self.grid)
        picture = picture[kept.top : kept.top + kept.height, kept.left : kept.left + kept.width]
        if kept.shrunk is not None:
            channels_first = rearrange(picture, "h w d -> 1 d h w")
            picture = rearrange(nnf.interpolate(channels_first, kept.shrunk, mode="bilinear"), "1 d h w -> h w d")
        if self.newline is not None:
            ends = self.newline.to(picture).expand(picture.shape[0], 1, -1)
            picture = torch.cat([picture, ends], dim=1)
        parts = [whole, picture.flatten(0, 1)]
        return torch.cat(parts if self.options.thumbnail == "first" else parts[::-1])

    def find_clips(self, number: Tensor, vision_grid: Tensor | None) -> Tensor:
        """Tell which media are clips, which have no rows of tiles: int[B, T_img, F] frames -> bool[B, T_img]."""
        if vision_grid is None:
            return torch.ones_like(number[..., 0], dtype=torch.bool)
        return vision_grid[..., 0].to(number.device) == 0

    def _is_pooled(self, grid: Sequence[int]) -> bool:
        """Tell whether the patches of a medium were pooled: those of clips, which have no rows of tiles."""
        return self.pools_patches and not grid[0]

    def _arrange_clip(self, tokens: Tensor, num_frames: int) -> Tensor:
        if self.options.clip_pool > 1 and not self.pools_patches:
            tokens = self.pool(tokens.unflatten(0, (num_frames, -1))).flatten(0, 1)
        if self.newline is None or not self.options.clip_newline:
            return tokens
        return torch.cat([tokens, self.newline[None].to(tokens)])


def _valid(tokens: Tensor, mask: Tensor) -> Tensor:
    """Leave out padding, which nearly always comes last: float[F·v, d], bool[F·v] -> float[valid, d]."""
    count = int(mask.sum())
    if bool(mask[:count].all()):
        return tokens[:count]
    return tokens[moved(mask.nonzero()[:, 0], tokens.device)]


def make_arrangement(options: AnyresOptions, tokenizer: Any) -> Arrangement:
    """Make the arrangement behind a vision tokenizer.

    Raises:
        CompositionError: if the tokens of a view are no grid, if the tokenizer reads the views together, or if the
            patches of clips cannot be pooled.
    """
    grid = getattr(tokenizer, "token_grid", None)
    if grid is None or tokenizer.num_tokens(2) != 2 * grid[0] * grid[1]:
        raise CompositionError(
            "tiling.type=anyres puts the vision tokens of tiles side by side, and the vision tokenizer gives no grid "
            "of tokens for each tile. Choose a linear or mlp one with frames=concatenate and without class_token, or "
            "the tiling grid."
        )
    if options.clip_pool > 1 and options.clip_pool_at == "before" and tokenizer.grid != grid:
        raise CompositionError(
            "tiling.clip_pool merges the patches of clips before the vision tokenizer, which merges patches itself. "
            "Set tiling.clip_pool_at to after."
        )
    return Arrangement(options, grid, tokenizer.dim_out)
