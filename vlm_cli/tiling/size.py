"""`MediumSize`: what decides how many vision tokens and positions one medium takes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MediumSize"]


@dataclass(frozen=True)
class MediumSize:
    """What decides how many positions one medium takes, without its pixels; the default is a picture of one view.

    Attributes:
        num_frames: views of a picture, its thumbnail included, or frames of a clip.
        rows: rows of tiles; 0 for a clip and for a picture that is one view.
        columns: columns of tiles; 0 as for `rows`.
        height: pixels of the picture as it was given; 0 as for `rows`.
        width: pixels of the picture as it was given; 0 as for `rows`.
    """

    num_frames: int = 1
    rows: int = 0
    columns: int = 0
    height: int = 0
    width: int = 0

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """A row of `vision_grid`: rows, columns, height, width."""
        return self.rows, self.columns, self.height, self.width

    @property
    def has_thumbnail(self) -> bool:
        """Whether the whole picture stands beside its tiles."""
        return self.rows > 0 and self.num_frames > self.rows * self.columns
