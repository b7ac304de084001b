"""`check_tiling`: refuse a tiling that does not fit a vision encoder, or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm_cli.composition.tiling import AnyresOptions, SplitOptions
from vlm_cli.errors import CompositionError
from vlm_cli.tiling.anyres import list_canvases
from vlm_cli.tiling.split import longest_edge
from vlm_cli.tiling.views import Pixels

if TYPE_CHECKING:
    from vlm_cli.composition import Choice

__all__ = ["check_one_size", "check_tiling"]


def check_one_size(tiles: Sequence[Pixels]) -> None:
    """Refuse encoders that read tiles of different sizes: a picture is cut once for all of them.

    Args:
        tiles: size of what each encoder reads, (width, height) in pixels.

    Raises:
        CompositionError: with the sizes.
    """
    if len(set(tiles)) > 1:
        sizes = " and ".join(f"{width}x{height}" for width, height in tiles)
        raise CompositionError(
            f"a picture cannot be cut into tiles for several encoders of {sizes} pixels. Give each encoder the same "
            "image_size, or leave out the tiling: --set tiling=none."
        )


def check_tiling(tiling: Choice, *tiles: Pixels) -> None:
    """Refuse a tiling whose tiles are not what the vision encoder reads.

    Args:
        tiling: the composition's.
        tiles: size of what the vision encoder reads, (width, height) in pixels; of several encoders, that of each.

    Raises:
        CompositionError: with the sizes.
    """
    if tiling.type != "none":
        check_one_size(tiles)
    options, tile = tiling.options, tiles[0]
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
