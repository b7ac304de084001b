"""What preprocessing makes of an image: OpenCLIP's and Transformers' pixels, bounded memory, and words."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

from tests.support.grid import first_of
from vlm_cli import preprocessing
from vlm_cli.preprocessing import Preprocessing

WAYS: list[dict[str, Any]] = [
    {"resize_mode": "shortest"},
    {"resize_mode": "longest"},
    {"resize_mode": "squash"},
    {"resize_mode": "shortest", "size": (24, 40)},
    {"resize_mode": "longest", "interpolation": "bilinear", "fill_color": 90},
]
SIZES = [(61, 47), (32, 32), (48, 33), (30, 700), (5, 3), (64, 44), (100, 31), (31, 100)]


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(0).randbytes(size[0] * size[1] * 3))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_pixels_are_those_of_openclip_to_the_last_bit(way):
    settings = {"size": 32, **way}
    ours, theirs = Preprocessing(settings), image_transform_v2(PreprocessCfg(**settings), is_train=False)
    for size in SIZES:
        image = noise(size)
        assert torch.equal(ours(image), theirs(image)), size


def test_a_crop_of_transformers_starts_where_transformers_starts():
    """Widths from 32 to 48 make every margin; the two ways to crop differ where it is 3, 7, 11 or 15."""
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    down, rounded = Preprocessing({"size": 32, "crop": "down"}), Preprocessing({"size": 32})
    differs = []
    for width in range(32, 49):
        image = noise((width, 32))
        wanted = theirs(image, return_tensors="pt")["pixel_values"][0]
        assert (down(image) - wanted).abs().max() < 1e-5
        if (rounded(image) - wanted).abs().max() > 0.1:
            differs.append(width - 32)
    assert differs == [3, 7, 11, 15]


def test_pictures_with_bars_are_those_of_deepseek_vl():
    """A thin picture keeps 14 pixels."""
    theirs = DeepseekVLImageProcessorPil(size={"height": 32, "width": 32})
    settings = {"size": 32, "resize_mode": "longest", "fill_color": (122, 116, 104)}
    ours, openclip = Preprocessing({**settings, "least_side": 14}), Preprocessing(settings)
    differs = []
    for size in SIZES:
        image = noise(size)
        wanted = theirs(image, return_tensors="pt")["pixel_values"][0]
        assert (ours(image) - wanted).abs().max() < 1e-5, size
        if (openclip(image) - wanted).abs().max() > 0.1:
            differs.append(size)
    assert differs == [(30, 700), (100, 31), (31, 100)]
    # 147 pixels become 31.5, and both implementations round as their own last bit says.
    given = {"height": 147, "width": 1792}
    large = theirs.resize(np.zeros((3, *given.values()), np.uint8), SizeDict(height=384, width=384), min_size=14)
    assert large.shape[1:] == (32, 384)
    for way, height in (({"least_side": 14}, 32), ({}, 31)):
        placed = Preprocessing({"size": 384, "resize_mode": "longest", **way}).place(given["width"], given["height"])
        assert placed.resized == (384, height)


# "squash" makes nothing larger than what the encoder sees.
@pytest.mark.parametrize("way", [way for way in WAYS if way["resize_mode"] != "squash"], ids=str)
@pytest.mark.parametrize("size", first_of([(900, 20), (20, 900)]))
def test_the_seen_part_of_a_large_result_is_made_alone(monkeypatch, way, size):
    settings, image = {"size": 32, **way}, noise(size)
    whole = Preprocessing(settings).cut(image)
    monkeypatch.setattr(preprocessing, "MAX_RESIZED", 0)
    part = Preprocessing(settings).cut(image)
    assert abs(np.asarray(part, int) - np.asarray(whole, int)).max() <= 1
    turned = image.transpose(Image.Transpose.ROTATE_180)
    assert abs(np.asarray(Preprocessing(settings).cut(turned), int) - np.asarray(whole, int)).max() > 1


@pytest.mark.parametrize("size", [(20_000, 1), (1, 65_000)])
@pytest.mark.parametrize("way", WAYS[:3], ids=str)
def test_a_thin_image_takes_little_memory(monkeypatch, size, way):
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a: made.append(size) or resize(self, size, *a))
    pixels = Preprocessing({"size": 224, **way})(Image.new("RGB", size, "red"))
    assert pixels.shape == (3, 224, 224) and all(w * h <= preprocessing.MAX_RESIZED for w, h in made)
    assert (pixels[0] > 1.9).any()  # red


@pytest.mark.parametrize(
    ("way", "size", "words"),
    [
        ("shortest", (8000, 6000), "8000x6000 → 224x224, centre crop, 25 % unseen"),
        ("shortest", (300, 300), "300x300 → 224x224"),
        ("shortest", (20000, 1), "20000x1 → 224x224, centre crop, over 99 % unseen"),
        ("squash", (640, 480), "640x480 → 224x224, squashed"),
        ("squash", (448, 448), "448x448 → 224x224"),
        ("longest", (640, 480), "640x480 → 224x224, with bars"),
    ],
)
def test_what_becomes_of_a_picture_in_words(way, size, words):
    placement = Preprocessing({"size": 224, "resize_mode": way}).place(*size)
    assert placement.describe() == words
    assert (placement.unseen > 0) == ("unseen" in words)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("shortest", "shorter side to 224 pixels, centre crop 224x224"),
        ("longest", "longer side to 224 pixels, with bars to 224x224"),
        ("squash", "squashed to 224x224"),
    ],
)
def test_what_becomes_of_every_picture_in_words(way, words):
    assert Preprocessing({"size": 224, "resize_mode": way}).describe() == words
