"""The views of real photographs, compared with Transformers' own image processors, in their Pillow backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.support.photographs import PHOTOGRAPHS, nanovlm_views, photograph
from vlm_cli.checkpoint.schemas.processor_files import check_processor_files
from vlm_cli.composition import UNTILED
from vlm_cli.errors import CheckpointError, CompositionError, MediaError
from vlm_cli.image_processor import OpenCLIPImageProcessor

MEAN, STD = [0.48, 0.45, 0.40], [0.26, 0.25, 0.27]
PINPOINTS = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]


def ours(tiling: dict[str, Any], tile: int = 48, **changes: Any) -> OpenCLIPImageProcessor:
    settings = {"size": tile, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"} | changes
    return OpenCLIPImageProcessor(settings, tiling)


def theirs(kind: type, image: Image.Image, **settings: Any) -> Tensor:
    """The views that Transformers' image processor makes of one picture."""
    processor = kind(image_mean=MEAN, image_std=STD, **settings)
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    return pixels.reshape(-1, *pixels.shape[-3:])


def check(processor: OpenCLIPImageProcessor, image: Image.Image, expected: Tensor) -> None:
    found = processor.preprocess([[[image]]])
    assert found["pixel_values"].shape[2:] == expected.shape
    torch.testing.assert_close(found["pixel_values"][0, 0], expected, atol=2e-6, rtol=0)
    size = processor.measure(*image.size)
    assert size.num_frames == len(expected) and found["vision_mask"].sum() == len(expected)
    assert found["vision_grid"][0, 0].tolist() == list(size.grid)
    assert size.grid[2:] == ((0, 0) if len(expected) == 1 else image.size[::-1])


@pytest.mark.parametrize("shape", PHOTOGRAPHS)
@pytest.mark.parametrize("most", [12, 4])
def test_grid_makes_the_pixels_of_internvl(shape: str, most: int) -> None:
    settings = {"size": {"height": 48, "width": 48}, "crop_to_patches": True, "max_patches": most}
    image = photograph(shape)
    check(ours({"type": "grid", "max_tiles": most}), image, theirs(GotOcr2ImageProcessorPil, image, **settings))


@pytest.mark.parametrize("shape", PHOTOGRAPHS)
@pytest.mark.parametrize("tile", [48, 96, 160])
def test_grid_makes_the_pixels_of_ovis2(shape: str, tile: int) -> None:
    settings = {"size": {"height": tile, "width": tile}, "crop_to_patches": True, "max_patches": 9}
    image = photograph(shape)
    ovis = {"type": "grid", "choose": "cover", "max_tiles": 9, "thumbnail": "first"}
    check(ours(ovis, tile), image, theirs(Ovis2ImageProcessorPil, image, **settings))


@pytest.mark.parametrize("shape", PHOTOGRAPHS)
@pytest.mark.parametrize("tile", [48, 160])
def test_grid_makes_the_pixels_of_mllama(shape: str, tile: int) -> None:
    """Mllama fills up to four tiles with zeros."""
    image, size = photograph(shape), {"height": tile, "width": tile}
    processor = MllamaImageProcessorPil(image_mean=MEAN, image_std=STD, size=size, max_image_tiles=4, resample=2)
    found = processor(images=[image], return_tensors="pt")
    pixels, num_views = found["pixel_values"][0, 0], int(found["aspect_ratio_mask"].sum())
    assert not pixels[num_views:].any()
    settings = {"type": "grid", "choose": "scale", "fit": "corner", "max_tiles": 4, "thumbnail": "none"}
    check(ours(settings, tile, interpolation="bilinear"), image, pixels[:num_views])
    if shape == "3:2":
        squashed = ours({**settings, "fit": "squash"}, tile, interpolation="bilinear").preprocess([[[image]]])
        assert float((squashed["pixel_values"][0, 0] - pixels[:num_views]).abs().max()) > 0.1


@pytest.mark.parametrize("shape", PHOTOGRAPHS)
@pytest.mark.parametrize("kind", [LlavaNextImageProcessorPil, LlavaOnevisionImageProcessorPil])
def test_anyres_makes_the_pixels_of_llava_next(shape: str, kind: type) -> None:
    square = {"height": 48, "width": 48}
    settings = {"size": square, "crop_size": square, "image_grid_pinpoints": PINPOINTS}
    image = photograph(shape)
    check(ours({"type": "anyres", "pinpoints": PINPOINTS}), image, theirs(kind, image, **settings))


@pytest.mark.parametrize("shape", PHOTOGRAPHS)
@pytest.mark.parametrize("kind", [Idefics3ImageProcessorPil, SmolVLMImageProcessorPil])
@pytest.mark.parametrize("edge", [192, 130])
def test_split_makes_the_pixels_of_idefics3(shape: str, kind: type, edge: int) -> None:
    settings = {"size": {"longest_edge": edge}, "max_image_size": {"longest_edge": 48}}
    processor = ours({"type": "split", "longest_edge": edge}, interpolation="lanczos")
    image = photograph(shape)
    check(processor, image, theirs(kind, image, **settings))


@pytest.mark.parametrize("shape", PHOTOGRAPHS)
@pytest.mark.parametrize("enlarge", [True, False])
def test_split_makes_the_pixels_of_nanovlm(shape: str, enlarge: bool) -> None:
    image = photograph(shape)
    tiling = {"type": "split", "rules": "nanovlm", "thumbnail": "first", "longest_edge": 192, "enlarge": enlarge}
    check(ours(tiling, mean=[0.0] * 3, std=[1.0] * 3), image, nanovlm_views(image, 48, 192, enlarge=enlarge)[0])


def test_another_filter_or_order_makes_other_pixels() -> None:
    image = photograph("3:2")
    settings = {"size": {"height": 48, "width": 48}, "crop_to_patches": True}
    expected = theirs(GotOcr2ImageProcessorPil, image, **settings)
    for wrong in (ours({"type": "grid", "thumbnail": "first"}), ours({"type": "grid"}, interpolation="bilinear")):
        with pytest.raises(AssertionError, match="not close"):
            check(wrong, image, expected)


def test_thumbnail_stands_where_the_tiling_says() -> None:
    image = photograph("4:1")
    first, last, none = (ours({"type": "grid", "thumbnail": x}).cut(image) for x in ("first", "last", "none"))
    assert torch.equal(first[1:], none) and torch.equal(last[:-1], none) and torch.equal(first[0], last[-1])


def test_views_of_a_batch_are_padded_at_the_end() -> None:
    pictures = [[[photograph("4:1")], [photograph("tiny")]], [[photograph("1:1")] * 3]]
    found = ours({"type": "grid", "max_tiles": 6}).preprocess(pictures)
    assert found["vision_mask"].sum(-1).tolist() == [[5, 1], [3, 0]]
    assert found["vision_grid"].tolist() == [[[1, 4, 100, 400], [0] * 4], [[0] * 4, [0] * 4]]  # a clip is not cut
    assert not found["pixel_values"][~found["vision_mask"]].any()


def test_a_large_photograph_that_was_read_smaller_keeps_its_plan() -> None:
    image, processor = photograph("3:2"), ours({"type": "anyres", "pinpoints": PINPOINTS})
    small = image.resize((200, 133))
    assert processor.cut(small, 400, 266).shape == processor.cut(image).shape
    assert (processor.cut(small, 400, 266) - processor.cut(image)).abs().mean() < 0.1


def test_most_tiles_can_be_changed_at_run_time() -> None:
    processor = ours({"type": "grid"})
    processor.limit_tiles(2)
    assert processor.cut(photograph("4:1")).shape[0] == 3
    announced = ours({"type": "grid", "max_tiles": 4, "tile_text": "<{number}>{image}"})
    announced.limit_tiles(2)
    with pytest.raises(CompositionError, match="the model knows the texts of at most 4 tiles: '<5>' is not among"):
        ours({"type": "grid", "max_tiles": 4, "tile_text": "<{number}>{image}"}).limit_tiles(6)
    with pytest.raises(CompositionError, match="its tiling is none"):
        OpenCLIPImageProcessor({"size": 48}).limit_tiles(2)


def test_words_say_what_becomes_of_a_picture() -> None:
    grid, split = ours({"type": "grid", "max_tiles": 6}), ours({"type": "split", "thumbnail": "none"})
    anyres = ours({"type": "anyres", "pinpoints": [[48, 48]]})
    assert grid.describe() == "cut into at most 6 tiles of 48x48 pixels, and the whole image"
    assert split.describe() == "cut into tiles of 48x48 pixels"
    assert grid.describe_image(400, 266) == "400x266 → 3x2 tiles of 48x48, and the whole image"
    assert grid.describe_image(30, 30) == "30x30 → 48x48, one view"
    assert split.describe_image(400, 266) == "400x266 → 4x3 tiles of 48x48"
    assert anyres.describe_image(400, 266) == "400x266 → 1 tile of 48x48, and the whole image"
    assert OpenCLIPImageProcessor({"size": 48}).describe_image(48, 48) is None


def test_settings_survive_a_file() -> None:
    processor = ours({"type": "anyres", "pinpoints": PINPOINTS, "shrink_beyond": 9})
    data = processor.to_dict()
    assert OpenCLIPImageProcessor(data["preprocess"], data["tiling"]).tiling == processor.tiling
    plain = OpenCLIPImageProcessor({"size": 48})
    assert "tiling" not in plain.to_dict() and plain.tiling == UNTILED
    assert "vision_grid" not in plain.preprocess([[[photograph("tiny")]]])


def test_the_file_of_an_image_processor_is_checked(tmp_path: Path) -> None:
    data = ours({"type": "anyres", "pinpoints": PINPOINTS}).to_dict()
    for tiling, words in (
        ({"type": "anyres", "pinpoints": [[10**12, 1]]}, r"image_processor\.tiling\.pinpoints must hold"),
        ({"type": "gird"}, r"unknown tiling 'gird'\. Did you mean 'grid'"),
        ("\x1b[31m", r"tiling must be a mapping of keys to values, or null, but is '\\x1b"),
        ({"type": "grid", "tile_text": "<image>{image}"}, "tile_text must not hold <image>"),
    ):
        text = json.dumps({"image_processor": data | {"tiling": tiling}})
        (tmp_path / "processor_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=words):
            check_processor_files(str(tmp_path))


def test_hostile_sizes_are_refused() -> None:
    with pytest.raises(CompositionError, match="65,536 pixels each"):
        ours({"type": "anyres", "pinpoints": [[48, 10**9]]})
    with pytest.raises(CompositionError, match="no canvas has at most 1,024 tiles"):
        ours({"type": "anyres", "pinpoints": [[48 * 100, 48 * 100]]}).measure(100, 100)
    with pytest.raises(CompositionError, match=r"vlm cuts at most 134,217,728\. Allow fewer tiles: --max-tiles 32\."):
        ours({"type": "grid", "max_tiles": 1000, "min_tiles": 900}, tile=2048).measure(300, 200)
    with pytest.raises(MediaError, match="too thin"):
        ours({"type": "anyres", "pinpoints": PINPOINTS}).cut(Image.new("RGB", (65000, 1)))
