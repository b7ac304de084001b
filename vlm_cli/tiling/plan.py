"""`plan`: say how one picture is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_cli.registry import TILINGS
from vlm_cli.tiling.views import Pixels, Views

if TYPE_CHECKING:
    from vlm_cli.composition import Choice

__all__ = ["plan"]


def plan(tiling: Choice, tile: Pixels, width: int, height: int) -> Views:
    """Say how a picture is cut.

    Args:
        tiling: the composition's.
        tile: size of what the vision encoder reads, (width, height) in pixels.
        width: of the picture, in pixels.
        height: of the picture, in pixels.

    Raises:
        MediaError: if no way to cut the picture leaves something of it in each tile.
    """
    return TILINGS[tiling.type].load()(tiling.options, tile, width, height)
