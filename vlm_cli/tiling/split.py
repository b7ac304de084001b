"""The tiling `split`: a picture is resized to whole tiles, nearly in its shape, beside the whole picture.

Source: Idefics3 (https://arxiv.org/abs/2408.12637), SmolVLM (https://arxiv.org/abs/2504.05299), nanoVLM
(https://github.com/huggingface/nanoVLM, `data/custom_transforms.py`). Transformers' `Idefics3ImageProcessor` cuts the
same under the rules `idefics3`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlm_cli.composition.tiling import TILE_LIMIT
from vlm_cli.tiling.views import Pixels, Views

if TYPE_CHECKING:
    from vlm_cli.composition import SplitOptions

__all__ = ["longest_edge", "plan"]

_MOST_OF_IDEFICS = 4096  # pixels of the longer side


def plan(options: SplitOptions, tile: Pixels, width: int, height: int) -> Views:
    """Find the canvas of a picture, and say how the picture is cut.

    If the canvas has more than `max_tiles` tiles, the longest edge is made shorter by one tile until it has not.
    """
    find_steps = _idefics3 if options.rules == "idefics3" else _nanovlm
    for edge in _edges(options, tile):
        steps = find_steps(options, tile, edge, width, height)
        columns, rows = steps[-1][0] // tile[0], steps[-1][1] // tile[1]
        if rows * columns <= (options.max_tiles or TILE_LIMIT):
            break
    else:
        steps, rows, columns = (tile,), 1, 1
    return Views(
        picture=(width, height),
        tile=tile,
        rows=rows,
        columns=columns,
        steps=steps,
        thumbnail=options.thumbnail if rows * columns > 1 else "none",
        thumbnail_of="canvas" if options.rules == "idefics3" else "exact canvas",
    )


def longest_edge(options: SplitOptions, tile: Pixels) -> int:
    """Return the pixels of the longer side of a resized picture."""
    return options.longest_edge or 4 * max(tile)


def _edges(options: SplitOptions, tile: Pixels) -> Iterator[int]:
    """Yield the longest edge, then every smaller multiple of a tile."""
    step, edge = max(tile), longest_edge(options, tile)
    yield edge
    yield from range((edge - 1) // step * step, 0, -step)


def _idefics3(options: SplitOptions, tile: Pixels, edge: int, width: int, height: int) -> tuple[Pixels, ...]:
    """Resize the longer side to the edge, then each side up to whole tiles."""
    longer, is_wide = max(width, height), width >= height
    edge = edge if options.enlarge else min(edge, longer)
    shape = width / height
    # The shorter side is rounded down, then up to an even number.
    shorter = max(1, _even(int(edge / shape if is_wide else edge * shape)))
    if edge > _MOST_OF_IDEFICS:
        shape = edge / shorter if is_wide else shorter / edge
        edge, shorter = _MOST_OF_IDEFICS, max(1, int(_MOST_OF_IDEFICS / shape if is_wide else _MOST_OF_IDEFICS * shape))
    first = (edge, shorter) if is_wide else (shorter, edge)
    shape = first[0] / first[1]
    if is_wide:
        across = _whole(first[0], tile[0])
        second = across, _whole(int(across / shape), tile[1])
    else:
        down = _whole(first[1], tile[1])
        second = _whole(int(down * shape), tile[0]), down
    return first, second


def _nanovlm(options: SplitOptions, tile: Pixels, edge: int, width: int, height: int) -> tuple[Pixels, ...]:
    """Resize each side to whole tiles at once; the longer side is not longer than the edge."""
    is_wide = width >= height
    longer, shorter = (width, height) if is_wide else (height, width)
    step, other = tile if is_wide else tile[::-1]
    target = edge if options.enlarge else min(edge, _whole(longer, step))
    rest = max(other, _whole(shorter * (target / longer), other))
    return ((target, rest) if is_wide else (rest, target),)


def _even(number: int) -> int:
    return number + number % 2


def _whole(length: float, step: int) -> int:
    """Round up to a multiple of `step`, and to `step` at least."""
    return max(1, math.ceil(length / step)) * step
