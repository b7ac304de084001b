"""Cohere2 Vision, Aya Vision, InternVL and Qianfan-OCR, against Transformers' classes and processors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import Cohere2VisionImageProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.grid_models import (
    SQUARE,
    Cohere2VisionImageProcessorPil,
    aya_vision,
    cohere2_vision,
    internvl,
    qianfan_ocr,
)
from tests.support.photographs import PHOTOGRAPHS, photograph
from tests.support.published import rewrite_config
from tests.support.tiled import check_tiled
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError

MADE = {"cohere2_vision": cohere2_vision, "aya_vision": aya_vision, "internvl": internvl}
MADE |= {"qianfan_ocr": qianfan_ocr} if "qianfan_ocr" in CONFIG_MAPPING else {}  # of a later release


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MADE)
def test_a_photograph(tmp_path, kind):
    check_tiled(MADE[kind](tmp_path), ["4:1"], is_told=True)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MADE)
def test_photographs_of_many_shapes(tmp_path, kind):
    check_tiled(MADE[kind](tmp_path))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize(
    "changes",
    [
        {"is_tied": False},
        {"is_tied": True},
        {"shard": "40KB"},
        {"images": {"max_patches": 3, "min_patches": 2}},
        {"images": {"max_patches": 1}},
        {"text": {"logit_scale": 0.25}},
        {"downsample_factor": 1, "tokens_of_a_side": 4},
    ],
    ids=str,
)
def test_ways_to_write_it(tmp_path, kind, changes):
    if kind in ("internvl", "qianfan_ocr"):
        changes = {"downsample_ratio": 1.0} if "downsample_factor" in changes else changes
        changes = {key: x for key, x in changes.items() if key != "text"}  # Qwen's logits have no scale
    imported = check_tiled(MADE[kind](tmp_path, **changes), ["3:2", "1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)
    assert any("logit_scale=0.25" in note for note in imported.notes) == ("text" in changes)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", [x for x in MADE if x != "cohere2_vision"])
@pytest.mark.parametrize("layer", [-2, 1, 3])
def test_another_layer(tmp_path, kind, layer):
    check_tiled(MADE[kind](tmp_path, vision_feature_layer=layer), ["2:3"])


@pytest.mark.matrix
@pytest.mark.parametrize(
    "settings", [{"use_mean_pooling": False}, {"use_qk_norm": True, "norm_type": "rms_norm"}], ids=str
)
def test_sizes_of_internvit(tmp_path, settings):
    """InternViT-300M has a mean of its patches and LayerNorms, InternViT-6B norms of queries and keys and RMSNorms."""
    check_tiled(internvl(tmp_path, vision=settings), ["2:3"])


@pytest.mark.matrix
def test_a_siglip_with_a_pooling_head(tmp_path):
    imported = check_tiled(cohere2_vision(tmp_path, vision={"vision_use_head": True}), ["2:3"])
    assert not any("head" in name for name in imported.report.absent if "added" not in name)


@pytest.mark.matrix
@pytest.mark.parametrize("crops", [True, False])
def test_cohere_cuts_only_if_its_file_says_so(tmp_path, crops):
    imported = check_tiled(cohere2_vision(tmp_path, images={"crop_to_patches": crops}), ["3:2"])
    assert imported.processor.image_processor.measure(400, 266).num_frames == (13 if crops else 1)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "over"),
    [
        ("cohere2_vision", {"tiling": {"choose": "shape"}}),
        ("cohere2_vision", {"tiling": {"tile_text": "{image}"}}),
        ("cohere2_vision", {"vision_tokenizer": {"shuffle_order": "channels"}}),
        ("aya_vision", {"tiling": {"thumbnail": "first"}}),
        ("aya_vision", {"tiling": {"thumbnail_text": "{image}TILE_GLOBAL"}}),
        ("aya_vision", {"vision_tokenizer": {"norm_eps": 1e-2}}),
        ("aya_vision", {"vision_encoder": {"norm": True}}),
        ("internvl", {"tiling": {"picture_text": "</img>{views}<img>"}}),
        ("internvl", {"vision_encoder": {"layer": -2}}),
        ("internvl", {"vision_tokenizer": {"activation": "relu"}}),
    ],
    ids=str,
)
def test_another_setting_is_noticed(tmp_path, kind, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(MADE[kind](tmp_path), over=over))


@pytest.mark.sample(1)
@pytest.mark.parametrize("shape", PHOTOGRAPHS)
def test_pixels_of_cohere_are_those_of_torchvision(shape):
    """Both cut the same tiles. A bicubic resize of torchvision rounds bytes by itself, at edges by several levels."""
    image, level = photograph(shape), 1 / 255 / 0.26
    settings = {"size": SQUARE, "return_tensors": "pt"}
    theirs = Cohere2VisionImageProcessor()([image], **settings)["pixel_values"]
    ours = Cohere2VisionImageProcessorPil()([image], **settings)["pixel_values"]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.3 * level < (ours - theirs.flip(-1)).abs().mean()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("kind", "file", "changes", "words"),
    [
        ("cohere2_vision", "config.json", {"downsample_factor": 4}, "1 vision tokens for each tile .* writes 4"),
        ("cohere2_vision", "processor_config.json", {"tile_token": "x"}, "sets tile_token='x'"),
        ("cohere2_vision", "tokenizer_config.json", {"boi_token": 7}, "boi_token=7, which is no token"),
        ("aya_vision", "config.json", {"vision_feature_select_strategy": "default"}, "builds only 'full'"),
        ("aya_vision", "config.json", {"vision_feature_layer": [-2, -1]}, r"of layers \[-2, -1\]"),
        ("aya_vision", "processor_config.json", {"img_size": 64}, "4 vision tokens for each tile .* writes 16"),
        ("internvl", "config.json", {"downsample_ratio": 0.4}, "downsample_ratio=0.4; vlm shuffles by 1/2"),
        ("internvl", "config.json", {"projector_hidden_act": "relu"}, "builds only 'gelu'"),
        ("internvl", "processor_config.json", {"image_seq_length": 256}, "4 vision tokens for each tile .* writes 256"),
        ("aya_vision", "processor_config.json", {"tile_token": 7}, "tile_token=7; expected such as 'TILE'"),
    ],
)
def test_what_is_not_read(tmp_path_factory, kind, file, changes, words):
    folder = tmp_path_factory.mktemp(kind)
    MADE[kind](folder)
    rewrite_config(folder, file, **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(folder)
