"""`Bands`: the patches of a picture's tiles in the groups in which xGen-MM's vision tokenizer reads them.

Source: https://github.com/salesforce/LAVIS, branch `xgen-mm`, `_encode_vision_x_anyres` of `open_flamingo/src/vlm.py`.
That code joins the tiles to the canvas, masks the bars, and cuts the rows of the canvas, one after the other, into as
many groups as there were tiles. So a group is a band of the canvas, and no tile:

    tiles   1 1 2 2      canvas of 1 x 2 tiles     first group   1 1 2 2   (the upper row)
            1 1 2 2                                second group  1 1 2 2   (the lower row)

B batch, T_img media per row, F views per medium, v patches of a view, d channels.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vlm_cli.composition import AnyresOptions
from vlm_cli.errors import CompositionError
from vlm_cli.tiling import MediumSize
from vlm_cli.tiling.anyres import unpad

__all__ = ["Bands", "make_bands"]


class Bands:
    """Groups the patches of tiles anew, between the vision encoder and the vision tokenizer.

    Args:
        options: of the composition's tiling.
        grid: (rows, columns) of the patches of one view.
    """

    def __init__(self, options: AnyresOptions, grid: tuple[int, int]) -> None:
        self.options, self.grid = options, grid

    def __call__(self, features: Tensor, vision_grid: Tensor) -> tuple[Tensor, Tensor]:
        """Group the patches of all media.

        Args:
            features: float[B, T_img, F, v, d], tile after tile.
            vision_grid: int[B, T_img, 4], see `VLM.encode_vision`.

        Returns:
            float[B, T_img, F, v, d] patches, and bool[B, T_img, F, v], false for patches of bars.
        """
        grouped = features.clone()
        mask = torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device)
        for b, row in enumerate(vision_grid.tolist()):
            for t, (rows, columns, height, width) in enumerate(row):
                if rows:
                    size = MediumSize(rows * columns + 1, rows, columns, height, width)
                    start = int(self.options.thumbnail == "first")
                    tiles = slice(start, start + rows * columns)
                    grouped[b, t, tiles], mask[b, t, tiles] = self.group(features[b, t, tiles], size)
        return grouped, mask

    def group(self, tiles: Tensor, size: MediumSize) -> tuple[Tensor, Tensor]:
        """Group the patches of one picture: float[N, v, d] -> float[N, v, d], bool[N, v]."""
        h, w = self.grid
        canvas = rearrange(tiles, "(R C) (h w) d -> (R h) (C w) d", R=size.rows, C=size.columns, h=h, w=w)
        kept = unpad(self.options, size, self.grid)
        mask = torch.zeros(canvas.shape[:2], dtype=torch.bool, device=tiles.device)
        mask[kept.top : kept.top + kept.height, kept.left : kept.left + kept.width] = True
        return canvas.reshape(tiles.shape), mask.reshape(tiles.shape[:2])


def make_bands(options: Any, tokenizer: Any, grid: tuple[int, int] | None) -> Bands | None:
    """Make what groups the patches of tiles; None if a composition does not ask for it.

    Raises:
        CompositionError: if the vision tokenizer cannot leave out single patches, or the patches are no grid.
    """
    if not (isinstance(options, AnyresOptions) and options.bands):
        return None
    if not getattr(tokenizer, "reads_patch_masks", False) or grid is None:
        raise CompositionError(
            "tiling.bands needs a vision tokenizer that leaves out the patches of bars, view by view, and an encoder "
            "whose patches are a grid. Choose vision_tokenizer.type=perceiver with frames=apart, or bands=false."
        )
    return Bands(options, grid)
