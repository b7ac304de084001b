"""Parts of real photographs, by their shape: wide, tall, square, panoramas, and one smaller than a tile."""

from __future__ import annotations

from functools import cache

from PIL import Image

from tests.support import ROOT

#: Shape -> a photograph of examples/images, and a box in it.
PHOTOGRAPHS = {
    "3:2": ("cat", (0, 0, 400, 266)),
    "1:1": ("astronaut", (0, 0, 384, 384)),
    "2:3": ("astronaut", (64, 0, 320, 384)),
    "4:1": ("rocket", (0, 80, 400, 180)),
    "1:4": ("coffee", (200, 0, 267, 267)),
    "16:9": ("coffee", (0, 20, 399, 244)),
    "9:16": ("rocket", (120, 1, 270, 266)),
    "tiny": ("cat", (150, 90, 181, 116)),
}


@cache
def photograph(shape: str) -> Image.Image:
    name, box = PHOTOGRAPHS[shape]
    return Image.open(ROOT / "examples" / "images" / f"{name}.jpg").convert("RGB").crop(box)
