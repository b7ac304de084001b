"""Parts of real photographs, by their shape: wide, tall, square, panoramas, and one smaller than a tile."""

from __future__ import annotations

from functools import cache

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

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


def nanovlm_views(image: Image.Image, tile: int, edge: int, *, enlarge: bool) -> tuple[Tensor, int, int]:
    """The views that nanoVLM makes, the whole picture first, and the rows and columns of tiles.

    Source: https://github.com/huggingface/nanoVLM, data/custom_transforms.py, at 4e0c096.
    """
    longer, shorter = max(image.size), min(image.size)
    across = edge if enlarge else min(edge, -(-longer // tile) * tile)
    down = next(n * tile for n in range(1, 99) if n * tile >= shorter * (across / longer))
    size = [down, across] if image.width >= image.height else [across, down]
    resized = functional.resize(image, size, interpolation=functional.InterpolationMode.BICUBIC)
    canvas = functional.to_tensor(resized)
    rows, columns = size[0] // tile, size[1] // tile
    tiles = [canvas[:, r * tile :, c * tile :][:, :tile, :tile] for r in range(rows) for c in range(columns)]
    whole = [] if len(tiles) == 1 else [functional.resize(canvas, [tile, tile])]
    return torch.stack([*whole, *tiles]), rows, columns
