"""Perception-LM, against Transformers' class and processor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    PerceptionLMImageProcessor,
)

from tests.support.perception_lm import TILE, PerceptionLMImageProcessorPil, case
from tests.support.photographs import PHOTOGRAPHS, photograph
from tests.support.published import rewrite_config
from tests.support.tiled import check_tiled
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError


def test_a_photograph(tmp_path):
    check_tiled(case(tmp_path), ["tiny"], is_told=True)


@pytest.mark.matrix
def test_photographs_of_many_shapes(tmp_path):
    check_tiled(case(tmp_path))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [
        {"is_tied": False},
        {"shard": "40KB"},
        {"images": {"max_num_tiles": 4}},
        {"images": {"vision_input_type": "vanilla"}},
        {"projector_pooling_ratio": 1},
        {"args": {"use_post_transformer_norm": True, "init_values": None}},
    ],
    ids=str,
)
def test_ways_to_write_it(tmp_path, changes):
    check_tiled(case(tmp_path, **changes), ["3:2", "1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "over",
    [
        {"tiling": {"choose": "shape"}},
        {"tiling": {"thumbnail": "last"}},
        {"vision_tokenizer": {"pool_at": "before"}},
        {"vision_encoder": {"layer": -2}},
    ],
    ids=str,
)
def test_another_setting_is_noticed(tmp_path, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(case(tmp_path), over=over))


@pytest.mark.matrix
def test_a_single_tile_has_a_thumbnail(tmp_path):
    """Both are the whole picture, so that their order cannot be seen; `check_tiled` would ask for it."""
    theirs = case(tmp_path, images={"max_num_tiles": 1}).read("3:2")["pixel_values"][0]
    for is_always in (True, False):
        imported = import_checkpoint(tmp_path, composition_over={"tiling": {"thumbnail_always": is_always}})
        views = imported.processor.image_processor.cut(photograph("3:2"))
        assert (views.shape == theirs.shape) == is_always
        torch.testing.assert_close(views, theirs[: len(views)], atol=2e-6, rtol=0)


@pytest.mark.sample(1)
@pytest.mark.parametrize("shape", ["3:2", "tiny"])
def test_pixels_are_those_of_torchvision(shape):
    """Both cut the same tiles. A bicubic resize of torchvision rounds bytes by itself, at edges by several levels."""
    image, level = photograph(shape), 1 / 255 / 0.5
    theirs = PerceptionLMImageProcessor(tile_size=TILE)([image], return_tensors="pt")["pixel_values"][0]
    ours = PerceptionLMImageProcessorPil()([image], return_tensors="pt")["pixel_values"][0]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.3 * level < (ours - theirs.flip(-1)).abs().mean()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"projector_pooling_ratio": 4}, "1 vision tokens for each tile .* writes 4"),
        ("config.json", {"vision_config": {"model_type": "siglip_vision_model"}}, "type 'siglip_vision_model'"),
        (
            "config.json",
            {"vision_config": {"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "x"}}},
            "model_args.checkpoint_path='x'",
        ),
        ("processor_config.json", {"image_processor": {"tile_size": 448}}, "tiles of 448 pixels, .* reads 112"),
        ("processor_config.json", {"image_processor": {"tile_size": TILE, "max_num_tiles": 0}}, "max_num_tiles=0"),
        ("processor_config.json", {"tile_token": "x"}, "sets tile_token='x'"),
    ],
)
def test_what_is_not_read(tmp_path_factory, file, changes, words):
    folder = tmp_path_factory.mktemp("perception_lm")
    case(folder)
    rewrite_config(folder, file, **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(folder)


def test_there_are_photographs_that_fit_a_canvas_and_such_that_do_not():
    """Perception-LM chooses the canvas in two ways."""
    chooser = PerceptionLMImageProcessor(max_num_tiles=4)
    fits = [chooser._fit_image_to_canvas(*photograph(shape).size, tile_size=TILE) for shape in PHOTOGRAPHS]
    assert None in fits and any(fits)
