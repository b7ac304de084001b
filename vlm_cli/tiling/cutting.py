"""`cut`: make the tiles of a picture, and the whole picture made small, with Pillow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_cli.tiling.views import Views

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

__all__ = ["Cut", "cut"]


@dataclass(frozen=True)
class Cut:
    """What became of a picture.

    Attributes:
        canvas: all tiles together.
        tiles: row by row.
        thumbnail: the whole picture at the size of a tile; None if it does not stand beside the tiles.
    """

    canvas: Image
    tiles: list[Image]
    thumbnail: Image | None


def cut(picture: Image, views: Views, resampling: Resampling) -> Cut:
    """Cut a picture.

    Args:
        picture: RGB. It may be smaller than `views` says, if the file of a large photograph was read at a smaller size.
        views: what becomes of it.
        resampling: Pillow's filter.
    """
    from PIL import Image as PIL

    canvas = picture
    for size in views.steps:
        if canvas.size != size:
            canvas = canvas.resize(size, resampling)
    if canvas.size != views.canvas:
        resized, canvas = canvas, PIL.new("RGB", views.canvas)
        canvas.paste(resized, views.start)
    width, height = views.tile
    corners = [(c * width, r * height) for r in range(views.rows) for c in range(views.columns)]
    tiles = [canvas.crop((x, y, x + width, y + height)) for x, y in corners]
    thumbnail = None
    if views.thumbnail != "none":
        whole = picture if views.thumbnail_of == "picture" else canvas
        thumbnail = whole.resize(views.tile, resampling)
    return Cut(canvas, tiles, thumbnail)
