"""`check_tiling`: refuse a tiling that does not fit a vision encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_cli.composition.tiling import AnyresOptions, SplitOptions
from vlm_cli.errors import CompositionError
from vlm_cli.tiling.anyres import list_canvases
from vlm_cli.tiling.split import longest_edge
from vlm_cli.tiling.views import Pixels

if TYPE_CHECKING:
    from vlm_cli.composition import Choice

__all__ = ["check_tiling"]


def check_tiling(tiling: Choice, tile: Pixels) -> None:
    """Refuse a tiling whose tiles are not what the vision encoder reads.

    Args:
        tiling: the composition's.
        tile: size of what the vision encoder reads, (width, height) in pixels.

    Raises:
        CompositionError: with the sizes.
    """
    options = tiling.options
    size = getattr(options, "tile_size", None)
    if size is not None and (size, size) != tuple(tile):
        raise CompositionError(
            f"tiling.tile_size is {size}, but the vision encoder reads {tile[0]}x{tile[1]} pixels. Leave tile_size "
            f"out, or give an encoder that reads tiles: --set vision_encoder.image_size={size}."
        )
    if isinstance(options, AnyresOptions):
        list_canvases(options, tile)
    if isinstance(options, SplitOptions) and longest_edge(options, tile) % max(tile) and options.rules == "nanovlm":
        raise CompositionError(
            f"tiling.longest_edge is {options.longest_edge}, which is not a multiple of the {max(tile)} pixels of a "
            "tile, as the rules nanovlm need it."
        )
