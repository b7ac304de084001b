"""Where views lie in their pictures: a dot is drawn in a picture, and found again in the pixels of its views."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.tracing.geometry import divide, locate_frame, locate_views, natural_cells, spread
from vlm_cli.tracing.trace import View

TILE = 32
PREPROCESS = {"size": TILE, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
PINPOINTS = [[64, 64], [32, 96], [96, 32]]
TILINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "grid": {"type": "grid", "max_tiles": 6, "thumbnail": "last"},
    "grid-fit": {"type": "grid", "max_tiles": 6, "fit": "corner", "thumbnail": "first"},
    "anyres": {"type": "anyres", "pinpoints": PINPOINTS},
    "split": {"type": "split", "max_tiles": 6},
    "idefics3": {"type": "split", "rules": "idefics3", "longest_edge": 96},
}
SIZES = [(200, 100), (90, 240), (64, 64), (300, 100)]


def find_dot(pixels: torch.Tensor) -> tuple[float, float] | None:
    """The middle of what is bright in float[C, H, W], in pixels from the upper left corner; None if nothing is."""
    bright = (pixels.mean(0).double() + 1).clamp(min=0)  # black is -1
    bright = torch.where(bright > 0.2 * bright.max(), bright, 0) if bright.max() > 0.4 else bright * 0
    if not bright.any():
        return None
    rows, columns = bright.sum(1), bright.sum(0)
    middle = torch.arange(TILE) + 0.5
    return float((columns * middle).sum() / columns.sum()), float((rows * middle).sum() / rows.sum())


def check_dot(processor: OpenCLIPImageProcessor, views: list[View], pixels: torch.Tensor, x: float, y: float) -> int:
    """In each view that shows the dot well inside, it lies where the view's box says; return how many do."""
    assert len(views) == len(pixels)
    found = 0
    for view, own in zip(views, pixels, strict=True):
        left, top, right, bottom = view.box
        expected = (x - left) / (right - left) * TILE, (y - top) / (bottom - top) * TILE
        if not all(4 < at < TILE - 4 for at in expected):
            continue
        dot = find_dot(own)
        assert dot is not None
        assert np.allclose(dot, expected, atol=1.0), (view, dot, expected)
        found += 1
    return found


#: Tiles are cut in their own way, whatever the mode.
CUTS = [
    *(("none", mode) for mode in ("shortest", "longest", "squash")),
    *((x, "shortest") for x in TILINGS if x != "none"),
]


@pytest.mark.sample(7)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tiling", "mode"), CUTS)
def test_a_dot_lies_where_the_box_says(tiling: str, mode: str, size: tuple[int, int]) -> None:
    processor = OpenCLIPImageProcessor(PREPROCESS | {"resize_mode": mode, "fill_color": 0}, TILINGS[tiling])
    width, height = size
    views = locate_views(processor, width, height, (4, 4))
    seen = 0
    for x, y in [(width // 2, height // 2), (width // 3, height // 4), (3 * width // 4, 2 * height // 3)]:
        picture = Image.new("RGB", size)
        radius = max(width, height) // 24
        picture.paste((255, 255, 255), (x - radius, y - radius, x + radius, y + radius))
        seen += check_dot(processor, views, processor.cut(picture), x, y)
    assert seen >= 1


def test_a_wrong_box_is_noticed() -> None:
    processor = OpenCLIPImageProcessor(PREPROCESS | {"resize_mode": "squash"})
    picture = Image.new("RGB", (100, 100))
    picture.paste((255, 255, 255), (40, 20, 48, 28))
    with pytest.raises(AssertionError):
        check_dot(processor, [View("whole", (0.0, 10.0, 100.0, 110.0), 4, 4)], processor.cut(picture), 44, 24)


def test_frames_are_cropped_as_the_tiling_says() -> None:
    tiling = {"type": "anyres", "pinpoints": PINPOINTS, "clip_crop": True}
    processor = OpenCLIPImageProcessor(PREPROCESS | {"resize_mode": "squash"}, tiling)
    (view,) = locate_frame(processor, 200, 100, (4, 4))
    assert view.box == (50.0, 0.0, 150.0, 100.0)


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [((100, 50), 8, (4, 8)), ((1, 1), 8, (1, 1)), ((3, 1000), 8, (8, 1)), ((2, 2), 8, (2, 2))],
)
def test_cells_have_the_aspect_of_the_picture(size: tuple[int, int], most: int, expected: tuple[int, int]) -> None:
    assert divide(*size, most) == expected


def test_cells_of_attention_are_as_fine_as_the_finest_view() -> None:
    whole, tile = View("whole", (0, 0, 200, 100), 4, 4), View("tile", (0, 0, 100, 100), 4, 4)
    assert natural_cells(200, 100, [whole, tile]) == (4, 8)
    assert natural_cells(2000, 1000, [View("tile", (0, 0, 50, 50), 8, 8)]) == (16, 32)


@pytest.mark.sample(1)
@pytest.mark.parametrize("box", [(0.0, 0.0, 60.0, 40.0), (-10.0, 5.0, 30.0, 50.0), (20.5, 3.25, 44.0, 39.0)])
def test_patches_are_spread_by_area(box: tuple[float, float, float, float]) -> None:
    """Against points strewn over each patch."""
    weights = torch.rand(2, 7)  # a class token, and 2×3 patches
    view = View("whole", box, 2, 3)
    found = spread(weights, view, (60, 40), 4, 5)
    expected = torch.zeros(2, 4, 5)
    left, top, right, bottom = box
    fine = 40
    for row in range(2):
        for column in range(3):
            share = (weights[:, 1 + 3 * row + column] + weights[:, 0] / 6) / fine**2
            for i in range(fine):
                for j in range(fine):
                    x = left + (right - left) * (column + (j + 0.5) / fine) / 3
                    y = top + (bottom - top) * (row + (i + 0.5) / fine) / 2
                    if 0 <= x < 60 and 0 <= y < 40:
                        expected[:, int(y // 10), int(x // 12)] += share
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.05)
    if box == (0.0, 0.0, 60.0, 40.0):
        torch.testing.assert_close(found.sum((1, 2)), weights.sum(1))
