"""The tiling `grid`: a picture is squashed to a canvas of whole tiles, or keeps its shape on one, with bars.

Source: InternVL 1.5, section 3.3 (https://arxiv.org/abs/2404.16821); Aya Vision (https://arxiv.org/abs/2505.08751).
Transformers' `GotOcr2ImageProcessor`, `Cohere2VisionImageProcessor` and `MllamaImageProcessor` choose the same grids.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from vlm_cli.composition.tiling import TILE_LIMIT
from vlm_cli.tiling.views import Pixels, Views

if TYPE_CHECKING:
    from vlm_cli.composition import GridOptions

__all__ = ["list_grids", "plan"]


def plan(options: GridOptions, tile: Pixels, width: int, height: int) -> Views:
    """Choose the grid of a picture, and say how the picture is cut."""
    grids = list_grids(options.min_tiles, options.max_tiles or TILE_LIMIT)
    columns, rows = _CHOOSE[options.choose](grids, tile, width, height)
    canvas = columns * tile[0], rows * tile[1]
    return Views(
        picture=(width, height),
        tile=tile,
        rows=rows,
        columns=columns,
        steps=(canvas if options.fit == "squash" else _fit(canvas, tile, width, height),),
        corner=options.fit == "corner",
        thumbnail=options.thumbnail if rows * columns > 1 or options.thumbnail_always else "none",
    )


@lru_cache(maxsize=16)
def list_grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """List all (columns, rows) of so many tiles: those of fewer tiles first, and of these the narrower ones.

    >>> list_grids(2, 4)
    ((1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1))
    """
    found = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1) if c * r >= least]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def _fit(canvas: Pixels, tile: Pixels, width: int, height: int) -> Pixels:
    """Return the size of a picture on a canvas: no side is longer than the canvas, and the picture keeps its shape.

    Only a picture that is smaller than a tile is enlarged, so that one of its sides is a tile's.
    """
    target = min(max(width, tile[0]), canvas[0]), min(max(height, tile[1]), canvas[1])
    across, down = target[0] / width, target[1] / height
    if across < down:
        return target[0], min(math.floor(height * across) or 1, target[1])
    return min(math.floor(width * down) or 1, target[0]), target[1]


def _nearest_in_shape(grids: tuple[tuple[int, int], ...], tile: Pixels, width: int, height: int) -> tuple[int, int]:
    """Return the grid whose columns over rows are nearest to width over height.

    Of several with the same shape (1x1, 2x2, 3x3), the largest that has less than twice the picture's pixels; if none
    has, the smallest.
    """
    shape, pixels = width / height, width * height
    distances = [abs(shape - columns / rows) for columns, rows in grids]
    least = min(distances)
    nearest = [grid for grid, distance in zip(grids, distances, strict=True) if distance == least]
    fitting = [g for g in nearest[1:] if pixels > 0.5 * tile[0] * tile[1] * g[0] * g[1]]
    return fitting[-1] if fitting else nearest[0]


def _least_enlarged(grids: tuple[tuple[int, int], ...], tile: Pixels, width: int, height: int) -> tuple[int, int]:
    """Return the grid that enlarges the picture least; if every grid makes it smaller, the one that does so least."""
    scales = [min(columns * tile[0] / width, rows * tile[1] / height) for columns, rows in grids]
    enlarging = [scale for scale in scales if scale >= 1]
    return grids[scales.index(min(enlarging) if enlarging else max(scales))]


_COVERED = 0.9  # of a picture's area


def _smallest_covering(grids: tuple[tuple[int, int], ...], tile: Pixels, width: int, height: int) -> tuple[int, int]:
    """Return the grid with the fewest tiles that cover nine tenths of the picture; if none does, the best of all.

    A tile covers what it shows without making it smaller. Transformers' `Ovis2ImageProcessor` judges each grid with
    rows and columns exchanged, and so does this function.
    """
    covered = {grid: _cover(grid, tile, width, height) for grid in grids}
    enough = [grid for grid in grids if covered[grid] > _COVERED]
    if enough:
        return min(enough, key=lambda grid: (grid[0] * grid[1], -covered[grid]))
    return min(grids, key=lambda grid: (-covered[grid], grid[0] * grid[1]))


def _cover(grid: tuple[int, int], tile: Pixels, width: int, height: int) -> float:
    """Return the fraction of a picture that tiles cover, cut into `grid[0]` rows and `grid[1]` columns."""
    heights, widths = (
        [length // count] * (count - 1) + [length - (count - 1) * (length // count)]
        for length, count in zip((height, width), grid, strict=True)
    )
    total = 0.0
    for h in heights:
        for w in widths:
            longer, shorter = max(w, h), min(w, h)
            total += shorter / longer * tile[1] * tile[1] if longer > tile[1] else longer * shorter
    return total / (width * height)


def _largest(grids: tuple[tuple[int, int], ...], tile: Pixels, width: int, height: int) -> tuple[int, int]:
    """Return the grid on which a picture that keeps its shape has the longest short side, if it need not shrink at all.

    If it must shrink on every grid: the largest grid of the nearest shape that is not wider than a wide picture, or is
    wider than a tall one. Grids are tried as Perception-LM's image processor does, shape after shape, those of many
    tiles first; of several with the same short side the last one wins.
    """
    shape = width / height
    by_shape: dict[float, list[tuple[int, int]]] = {}
    for columns, rows in sorted(grids, key=lambda grid: (-grid[0] * grid[1], grid[0])):
        by_shape.setdefault(columns / rows, []).append((columns, rows))
    holding = [g for same in by_shape.values() for g in same if g[0] * tile[0] >= width and g[1] * tile[1] >= height]
    if holding:
        return max(reversed(holding), key=lambda grid: _short_side(grid, tile, width, height))
    if shape >= 1:
        return by_shape[max(x for x in by_shape if x <= shape)][0]
    return by_shape[min(x for x in by_shape if x > shape)][0]


def _short_side(grid: tuple[int, int], tile: Pixels, width: int, height: int) -> float:
    """Return the pixels of a picture's shorter side when the picture fills a grid as far as its shape allows."""
    shape = width / height
    scale = min(grid[0] * tile[0] / width, grid[1] * tile[1] / height)
    if shape == 1:
        return scale * height
    return math.floor(scale * width / shape if shape > 1 else scale * height * shape)


_CHOOSE = {"shape": _nearest_in_shape, "scale": _least_enlarged, "cover": _smallest_covering, "largest": _largest}
