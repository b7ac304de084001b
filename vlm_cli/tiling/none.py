"""The tiling `none`: each picture is one view, which the vision encoder's own preprocessing makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_cli.tiling.views import Pixels, Views

if TYPE_CHECKING:
    from vlm_cli.composition import TilingOptions

__all__ = ["plan"]


def plan(options: TilingOptions, tile: Pixels, width: int, height: int) -> Views:
    """Leave a picture whole."""
    return Views(picture=(width, height), tile=tile)
