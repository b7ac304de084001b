"""Where the vision encoder's patches lie in a picture, and how what they have is spread over cells of the picture.

Boxes are (left, top, right, bottom) in pixels of the picture as it was given, x to the right, y down.
A rows that are spread, v features of a view: class tokens, then patches row after row; R rows and C columns of cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from vlm_cli.modeling.towers import find_grid
from vlm_cli.tracing.trace import View

if TYPE_CHECKING:
    from vlm_cli.image_processor import OpenCLIPImageProcessor
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.preprocessing import Preprocessing
    from vlm_cli.tiling import Views

__all__ = [
    "MOST_CELLS",
    "divide",
    "locate_frame",
    "locate_views",
    "natural_cells",
    "patch_grid",
    "spread",
]

Box = tuple[float, float, float, float]

MOST_CELLS = 32  # along a picture's longer side, of a map of attention


def patch_grid(model: VLM) -> tuple[int, int]:
    """Return the rows and columns of patches of one view; (1, 1) if the encoder's features are no grid."""
    vision = model.config.vision_config
    return find_grid(vision, vision["num_patches"], model.vision_encoder.class_token) or (1, 1)


def locate_views(processor: OpenCLIPImageProcessor, width: int, height: int, grid: tuple[int, int]) -> list[View]:
    """Say where the views of a picture lie in it, in the order in which the vision encoder reads them.

    Args:
        processor: of the model.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        grid: rows and columns of patches of one view.
    """
    views = processor.plan(width, height) if processor.cuts else None
    if views is None or not views.steps:
        return [View("whole", _seen(processor.preprocessing, width, height), *grid)]
    boxes: list[tuple[Literal["whole", "tile"], Box]] = [("tile", box) for box in _tile_boxes(views)]
    whole = (0.0, 0.0, float(width), float(height)) if views.thumbnail_of == "picture" else _canvas_box(views)
    if views.thumbnail == "first":
        boxes.insert(0, ("whole", whole))
    elif views.thumbnail == "last":
        boxes.append(("whole", whole))
    return [View(kind, box, *grid) for kind, box in boxes]


def locate_frame(processor: OpenCLIPImageProcessor, width: int, height: int, grid: tuple[int, int]) -> list[View]:
    """Say where the view of a clip's frame lies in it; arguments as for `locate_views`."""
    return [View("whole", _seen(processor.clip_preprocessing, width, height), *grid)]


def _seen(preprocessing: Preprocessing, width: int, height: int) -> Box:
    """Return the box of a picture that the vision encoder sees as its only view."""
    placement = preprocessing.place(width, height)
    (left, top), (right, bottom) = placement.start, map(sum, zip(placement.start, placement.seen, strict=True))
    return _scale((left, top, right, bottom), width / placement.resized[0], height / placement.resized[1])


def _scale(box: Box, across: float, down: float) -> Box:
    left, top, right, bottom = box
    return left * across, top * down, right * across, bottom * down


def _on_picture(views: Views, left: float, top: float, right: float, bottom: float) -> Box:
    """Bring a box from the canvas of tiles to the picture."""
    (x, y), (width, height) = views.start, views.steps[-1]
    across, down = views.picture[0] / width, views.picture[1] / height
    return _scale((left - x, top - y, right - x, bottom - y), across, down)


def _canvas_box(views: Views) -> Box:
    return _on_picture(views, 0, 0, *views.canvas)


def _tile_boxes(views: Views) -> list[Box]:
    width, height = views.tile
    corners = [(c * width, r * height) for r in range(views.rows) for c in range(views.columns)]
    return [_on_picture(views, x, y, x + width, y + height) for x, y in corners]


# -- cells -------------------------------------------------------------------------------------------------------------


def divide(width: int, height: int, most: int) -> tuple[int, int]:
    """Choose rows and columns of cells at a picture's aspect; no cell is smaller than a pixel.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        most: cells along the longer side.
    """
    longer = max(width, height)
    rows, columns = (max(1, min(side, round(most * side / longer))) for side in (height, width))
    return rows, columns


def natural_cells(width: int, height: int, views: Sequence[View]) -> tuple[int, int]:
    """Choose cells about as large as the smallest patches of any view, but no more than `MOST_CELLS` on a side."""
    patches = []
    for view in views:
        left, top, right, bottom = view.box
        patches.append(max(width, height) * max(view.columns / (right - left), view.rows / (bottom - top)))
    return divide(width, height, max(1, min(MOST_CELLS, round(max(patches)))))


def spread(weights: Tensor, view: View, size: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Spread what the features of a view have evenly over the cells that they cover: float[A, v] -> float[A, R, C].

    What lies beyond the picture, in bars, is left out. Class tokens stand for the whole view.

    Args:
        weights: of the features.
        view: of these features.
        size: (width, height) of the picture in pixels.
        rows: R.
        columns: C.
    """
    left, top, right, bottom = view.box
    across = _overlaps((left, right), view.columns, size[0], columns)  # [columns of patches, C]
    down = _overlaps((top, bottom), view.rows, size[1], rows)
    v = view.rows * view.columns
    classes, patches = weights[:, : weights.shape[1] - v], weights[:, weights.shape[1] - v :]
    patches = patches + classes.sum(-1, keepdim=True) / v
    return torch.einsum("arc,ri,cj->aij", patches.unflatten(1, (view.rows, view.columns)), down, across)


def _overlaps(interval: tuple[float, float], parts: int, length: int, cells: int) -> Tensor:
    """Return float[parts, cells]: the share of each part of an interval that lies in each cell of 0 to `length`."""
    start, end = interval
    bounds = torch.linspace(start, end, parts + 1, dtype=torch.float64)
    edges = torch.linspace(0, length, cells + 1, dtype=torch.float64)
    low = torch.maximum(bounds[:-1, None], edges[None, :-1])
    high = torch.minimum(bounds[1:, None], edges[None, 1:])
    return ((high - low).clamp(min=0) * parts / (end - start)).float()
