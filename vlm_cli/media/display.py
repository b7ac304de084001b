"""How a player shows the frames of a video file: turned, mirrored, and with pixels that are not square.

    stored 48 x 32    pixels twice as wide as high    turned clockwise
    ┌───────┐         ┌──────────────┐                ┌───────┐
    │▀      │    →    │▀▀            │       →        │      ▀│
    └───────┘         └──────────────┘                │      ▀│
                                                      └───────┘

The matrix a b u c d v x y w of ISO/IEC 14496-12, 8.3.2, moves the point (x, y) to (a·x + c·y, b·x + d·y).
"""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["find_shape", "show_frame"]

#: (a, b, c, d) -> Pillow's name of the same move.
_MOVES = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): "FLIP_LEFT_RIGHT",
    (1, 0, 0, -1): "FLIP_TOP_BOTTOM",
    (-1, 0, 0, -1): "ROTATE_180",
    (0, 1, -1, 0): "ROTATE_270",
    (0, -1, 1, 0): "ROTATE_90",
    (0, 1, 1, 0): "TRANSPOSE",
    (0, -1, -1, 0): "TRANSVERSE",
}


def find_shape(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Return the (width, height) of a frame with square pixels; the side that is too short grows.

    Args:
        width: stored pixels.
        height: stored pixels.
        aspect: of a pixel, width to height; None or 0 if the file does not say.
    """
    if not aspect or aspect < 0:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def show_frame(image: Image, aspect: Fraction | None, matrix: bytes | None) -> Image:
    """Turn a stored frame into what a player shows.

    Args:
        image: the stored frame.
        aspect: of a pixel, width to height; None or 0 if the file does not say.
        matrix: the display matrix, nine 32-bit numbers of this machine; None if there is none.
    """
    from PIL.Image import Resampling, Transpose

    if (shape := find_shape(*image.size, aspect)) != image.size:
        image = image.resize(shape, Resampling.BICUBIC)
    move = None if matrix is None else _read_move(matrix)
    return image if move is None else image.transpose(Transpose[move])


def _read_move(matrix: bytes) -> str | None:
    """Return Pillow's name of the move that is nearest to a display matrix; None for no move."""
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    nearest: Any = max(_MOVES, key=lambda move: a * move[0] + b * move[1] + c * move[2] + d * move[3])
    return _MOVES[nearest]
