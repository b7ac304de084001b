"""What stands around and between the views of one picture: runs of text, and runs of views.

With `tile_text: "<row_{row}_col_{column}>{image}"`, `row_end_text: "\\n"` and `thumbnail_text: "\\n<global>{image}"`, a
picture of 1x2 tiles and its thumbnail is

    ("<row_1_col_1>", 1, "<row_1_col_2>", 1, "\\n\\n<global>", 1)

where each number counts views, in their order. Without texts it is (3,): one run of three views.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from vlm_cli.composition.tiling import TILE_LIMIT, AnyresOptions, GridOptions, SplitOptions, TilingOptions
from vlm_cli.tiling.anyres import list_canvases
from vlm_cli.tiling.grid import list_grids
from vlm_cli.tiling.size import MediumSize
from vlm_cli.tiling.split import longest_edge
from vlm_cli.tiling.views import Pixels

if TYPE_CHECKING:
    from vlm_cli.composition import Choice

__all__ = ["Runs", "list_shapes", "list_texts", "render"]

#: Texts, and numbers of views that stand one after the other.
Runs = tuple[str | int, ...]

_PLACE = re.compile(r"\{(\w+)\}")


def render(options: TilingOptions, size: MediumSize) -> Runs:
    """Put the texts of a tiling around and between the views of one medium.

    Args:
        options: of the tiling.
        size: of the medium. A clip's frames are one run.
    """
    before, after = options.picture_text.split("{views}")
    return _join([before, *_views(options, size), after])


def _views(options: TilingOptions, size: MediumSize) -> Iterator[str | int]:
    """Yield texts and views in their order, the text around the whole picture left out."""
    if not isinstance(options, (GridOptions, SplitOptions)) or (size.num_frames > 1 and not size.rows):
        yield size.num_frames
        return
    if not size.rows:
        yield from _fill(options.thumbnail_text if options.whole_text is None else options.whole_text)
        return
    thumbnail = list(_fill(options.thumbnail_text)) if size.has_thumbnail else []
    if options.thumbnail == "first":
        yield from thumbnail
    for row in range(1, size.rows + 1):
        if row > 1:
            yield options.between_rows_text
        for column in range(1, size.columns + 1):
            if column > 1:
                yield options.between_tiles_text
            number = (row - 1) * size.columns + column
            yield from _fill(options.tile_text, row=row, column=column, number=number)
        yield from _fill(options.row_end_text, row=row)
    if options.thumbnail == "last":
        yield from thumbnail


def _fill(template: str, **values: int) -> Iterator[str | int]:
    """Yield the parts of a template: `{image}` is one view, and every other name in braces a number."""
    for i, part in enumerate(_PLACE.split(template)):
        yield part if i % 2 == 0 else 1 if part == "image" else str(values[part])


def _join(parts: Iterable[str | int]) -> Runs:
    """Put neighbouring texts together, and neighbouring views."""
    runs: list[str | int] = []
    for part in parts:
        if not part:
            continue
        if runs and type(runs[-1]) is type(part):
            runs[-1] += part  # type: ignore[operator]  # two texts, or two numbers
        else:
            runs.append(part)
    return tuple(runs)


def list_shapes(tiling: Choice, tile: Pixels) -> list[MediumSize]:
    """List a picture of each number of rows and columns that a tiling allows, and a picture of one view.

    Args:
        tiling: the composition's.
        tile: size of what the vision encoder reads, (width, height) in pixels.

    Raises:
        CompositionError: if the tiling does not fit the tile.
    """
    options = tiling.options
    if isinstance(options, GridOptions):
        grids: Iterable[tuple[int, int]] = list_grids(options.min_tiles, options.max_tiles or TILE_LIMIT)
    elif isinstance(options, AnyresOptions):
        grids = dict.fromkeys((w // tile[0], h // tile[1]) for w, h in list_canvases(options, tile))
    elif isinstance(options, SplitOptions):
        side, most = -(-longest_edge(options, tile) // min(tile)), options.max_tiles or TILE_LIMIT
        grids = [(c, r) for r in range(1, side + 1) for c in range(1, side + 1) if c * r <= most]
    else:
        grids = []
    found = [MediumSize()]
    for columns, rows in grids:
        extra = int(options.thumbnail != "none")
        if rows * columns > 1 or isinstance(options, AnyresOptions) or getattr(options, "thumbnail_always", False):
            found.append(MediumSize(rows * columns + extra, rows, columns, rows * tile[1], columns * tile[0]))
    return found


def list_texts(tiling: Choice, tile: Pixels) -> list[str]:
    """List every distinct run of text of every picture that a tiling allows.

    Args:
        tiling: the composition's.
        tile: size of what the vision encoder reads, (width, height) in pixels.
    """
    runs = (run for size in list_shapes(tiling, tile) for run in render(tiling.options, size))
    return list(dict.fromkeys(run for run in runs if isinstance(run, str)))
