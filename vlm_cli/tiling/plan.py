"""`plan`: say how one picture is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_cli.composition.tiling import TILE_LIMIT
from vlm_cli.errors import CompositionError
from vlm_cli.registry import TILINGS
from vlm_cli.tiling.views import Pixels, Views

if TYPE_CHECKING:
    from vlm_cli.composition import Choice

__all__ = ["MOST_PIXELS", "plan"]

MOST_PIXELS = 2**27  # of one canvas; more would fill the memory


def plan(tiling: Choice, tile: Pixels, width: int, height: int) -> Views:
    """Say how a picture is cut.

    Args:
        tiling: the composition's.
        tile: size of what the vision encoder reads, (width, height) in pixels.
        width: of the picture, in pixels.
        height: of the picture, in pixels.

    Raises:
        MediaError: if no way to cut the picture leaves something of it in each tile.
        CompositionError: if the tiling does not fit the tile, or asks for a huge canvas.
    """
    views: Views = TILINGS[tiling.type].load()(tiling.options, tile, width, height)
    if (pixels := views.canvas[0] * views.canvas[1]) > MOST_PIXELS:
        raise CompositionError(
            f"a picture of {width}x{height} pixels would become {views.columns}x{views.rows} tiles with {pixels:,} "
            f"pixels; vlm cuts at most {MOST_PIXELS:,}. Allow fewer tiles: --max-tiles {_count_fitting(tile)}."
        )
    return views


def _count_fitting(tile: Pixels) -> int:
    """Return how many tiles have as many pixels as a canvas may have."""
    return max(1, min(TILE_LIMIT, MOST_PIXELS // (tile[0] * tile[1])))
