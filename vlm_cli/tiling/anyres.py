"""The tiling `anyres`: a picture keeps its shape on one of several canvases, with bars, beside the whole picture.

Source: LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next), LLaVA-OneVision
(https://arxiv.org/abs/2408.03326, section 3). Transformers' `LlavaNextImageProcessor` cuts the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_cli.composition.tiling import TILE_LIMIT
from vlm_cli.errors import CompositionError, MediaError
from vlm_cli.tiling.size import MediumSize
from vlm_cli.tiling.views import Pixels, Views

if TYPE_CHECKING:
    from vlm_cli.composition import AnyresOptions

__all__ = ["Kept", "list_canvases", "plan", "unpad"]

#: Vision tokens shrink only if they are more than so many times the most, on each side (LLaVA-OneVision).
_TOLERATED = 1.1


def plan(options: AnyresOptions, tile: Pixels, width: int, height: int) -> Views:
    """Choose the canvas of a picture, and say how the picture is cut.

    Raises:
        MediaError: if the picture is so thin that nothing of it is left on any canvas.
    """
    canvas = _best_canvas(list_canvases(options, tile), width, height)
    across, down = canvas[0] / width, canvas[1] / height
    if across < down:
        resized = canvas[0], min(math.ceil(height * across), canvas[1])
    else:
        resized = min(math.ceil(width * down), canvas[0]), canvas[1]
    return Views(
        picture=(width, height),
        tile=tile,
        rows=canvas[1] // tile[1],
        columns=canvas[0] // tile[0],
        steps=(resized,),
        thumbnail=options.thumbnail,
    )


def list_canvases(options: AnyresOptions, tile: Pixels) -> list[Pixels]:
    """List the canvases that the pinpoints name, in their order, without those of more than `max_tiles` tiles.

    Raises:
        CompositionError: if a canvas does not consist of whole tiles, or none is left.
    """
    canvases = [(width, height) for height, width in options.pinpoints]
    sides = " and ".join(dict.fromkeys(map(str, tile[::-1])))
    for width, height in canvases:
        if width % tile[0] or height % tile[1]:
            raise CompositionError(
                f"tiling.pinpoints holds [{height}, {width}], which is not a whole number of tiles: the vision encoder "
                f"reads {tile[0]}x{tile[1]} pixels. Give multiples of {sides}."
            )
    most = options.max_tiles or TILE_LIMIT
    tiles = [(width // tile[0]) * (height // tile[1]) for width, height in canvases]
    kept = [canvas for canvas, number in zip(canvases, tiles, strict=True) if number <= most]
    if not kept:
        raise CompositionError(
            f"no canvas has at most {most:,} tiles: the smallest of tiling.pinpoints has {min(tiles):,}. "
            "Allow more tiles, or name smaller pinpoints."
        )
    return kept


def _best_canvas(canvases: list[Pixels], width: int, height: int) -> Pixels:
    """Return the canvas on which most of the picture's pixels survive, and of these the one with the least bars.

    Raises:
        MediaError: if no pixel survives on any.
    """

    def judge(canvas: Pixels) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        survive = min(int(width * scale) * int(height * scale), width * height)
        return survive, survive - canvas[0] * canvas[1]

    best = max(canvases, key=judge)
    if judge(best)[0] == 0:
        raise MediaError(
            f"a picture of {width}x{height} pixels is too thin to be cut into tiles: made to fit a canvas of "
            f"{best[0]}x{best[1]} pixels, it has less than one pixel on a side. Cut off a part of it first."
        )
    return best


# -- vision tokens of the canvas ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Which vision tokens of a canvas are kept, and to how many rows and columns they shrink.

    Attributes:
        top: rows of tokens before the first that is kept.
        left: columns of tokens before the first that is kept.
        height: rows that are kept.
        width: columns that are kept.
        shrunk: (rows, columns) to which the kept ones are interpolated; None if they stay.
    """

    top: int
    left: int
    height: int
    width: int
    shrunk: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns in the end."""
        return self.shrunk or (self.height, self.width)


def unpad(options: AnyresOptions, size: MediumSize, grid: tuple[int, int]) -> Kept:
    """Say which vision tokens of a picture's tiles stand for the picture, and not for bars.

    Args:
        options: of the tiling.
        size: of the picture.
        grid: rows and columns of vision tokens of one tile.

    Raises:
        MediaError: if no token is left.
    """
    height, width = size.rows * grid[0], size.columns * grid[1]
    top = left = 0
    # xGen-MM's code rounds down, and so do LLaVA's first releases; Transformers' mends what floating point adds.
    digits = None if options.bands else 7
    if options.unpad:
        if size.width / size.height > width / height:
            top = (height - _round_down(size.height * (width / size.width), digits)) // 2
        else:
            left = (width - _round_down(size.width * (height / size.height), digits)) // 2
    height, width = height - 2 * top, width - 2 * left
    if not (height and width):
        raise MediaError(
            f"a picture of {size.width}x{size.height} pixels is too thin: of its tiles' vision tokens, all stand for "
            "bars. Cut off a part of it first."
        )
    if options.shrink_beyond is None:
        return Kept(top, left, height, width, None)
    # The published rule squares the rows of a tile's tokens; the tiles of published models are square.
    ratio = math.sqrt(height * width / (options.shrink_beyond * grid[0] ** 2))
    shrunk = (int(height // ratio), int(width // ratio)) if ratio > _TOLERATED else None
    if shrunk is not None and not all(shrunk):
        raise MediaError(
            f"a picture of {size.width}x{size.height} pixels is too thin: shrunk to {options.shrink_beyond} tiles' "
            "worth of vision tokens, none is left. Cut off a part of it first."
        )
    return Kept(top, left, height, width, shrunk)


def _round_down(length: float, digits: int | None) -> int:
    """Round down, after rounding to so many digits."""
    return int(length if digits is None else round(length, digits))
