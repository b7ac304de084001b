"""`Views`: what becomes of one picture, and the cutting itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlm_cli.tiling.size import MediumSize

if TYPE_CHECKING:
    pass

__all__ = ["Pixels", "Views"]

Pixels = tuple[int, int]  # (width, height)


@dataclass(frozen=True, kw_only=True)
class Views:
    """How a picture is cut. All sizes are (width, height) in pixels.

    A picture is resized, put on a canvas of whole tiles, and cut; bars are black:

        picture 640x400   resized 672x420   canvas 672x672      views
        ┌──────────┐      ┌──────────┐      ┌─────┬─────┐       whole, [1], [2], [3], [4]
        │          │  →   │          │  →   │  1  │  2  │   →
        └──────────┘      └──────────┘      ├─────┼─────┤
                                            │  3  │  4  │
                                            └─────┴─────┘

    Attributes:
        picture: size of the picture as it was given.
        tile: size of each view.
        rows: rows of tiles on the canvas.
        columns: columns of tiles on the canvas.
        steps: sizes to which the picture is resized, one after the other. Empty if the vision encoder's own
            preprocessing makes the only view.
        corner: whether the resized picture stands at the top left of the canvas; otherwise it stands in the middle.
        thumbnail: where the whole picture stands among the views.
        thumbnail_of: what is made small: the picture as it was given, the canvas, or the canvas without rounding.
    """

    picture: Pixels
    tile: Pixels
    rows: int = 1
    columns: int = 1
    steps: tuple[Pixels, ...] = ()
    corner: bool = False
    thumbnail: Literal["first", "last", "none"] = "none"
    thumbnail_of: Literal["picture", "canvas", "exact canvas"] = "picture"

    @property
    def canvas(self) -> Pixels:
        """The size of all tiles together."""
        return self.columns * self.tile[0], self.rows * self.tile[1]

    @property
    def start(self) -> Pixels:
        """Where the resized picture begins on the canvas: (left, top). A bar before it is never the longer one."""
        resized = self.steps[-1] if self.steps and not self.corner else self.canvas
        return (self.canvas[0] - resized[0]) // 2, (self.canvas[1] - resized[1]) // 2

    @property
    def num_views(self) -> int:
        """The number of tiles, and one more for the whole picture if it stands beside them."""
        return self.rows * self.columns + (self.thumbnail != "none")

    def describe(self) -> str:
        """Say in words what becomes of the picture: `640x400 → 2x2 tiles of 336x336, and the whole image`."""
        given, tile = ("x".join(map(str, size)) for size in (self.picture, self.tile))
        if self.num_views == 1:
            return f"{given} → {tile}, one view"
        tiles = f"{self.columns}x{self.rows} tiles of {tile}" if self.rows * self.columns > 1 else f"1 tile of {tile}"
        return f"{given} → {tiles}{'' if self.thumbnail == 'none' else ', and the whole image'}"

    @property
    def size(self) -> MediumSize:
        """What decides how many positions the picture takes."""
        if self.num_views == 1:
            return MediumSize()
        return MediumSize(self.num_views, self.rows, self.columns, height=self.picture[1], width=self.picture[0])
