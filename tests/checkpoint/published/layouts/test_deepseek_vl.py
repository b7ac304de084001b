"""DeepSeek-VL, against Transformers' class and processor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.deepseek_vl import deepseek_vl
from tests.support.published import rewrite_config
from tests.support.tiled import check_tiled
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError


@pytest.mark.matrix
def test_a_photograph(tmp_path):
    """The quick case of the tests below."""
    check_tiled(deepseek_vl(tmp_path), ["4:1"], is_told=True)


@pytest.mark.matrix
def test_photographs_of_many_shapes(tmp_path):
    check_tiled(deepseek_vl(tmp_path))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [
        {"is_tied": False},
        {"shard": "40KB"},
        {"has_head": True},
        {"min_size": 20},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"resample": 2},
    ],
    ids=str,
)
def test_ways_to_write_it(tmp_path, changes):
    check_tiled(deepseek_vl(tmp_path, **changes), ["1:4", "3:2"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "over",
    [
        {"vision_tokenizer": {"activation": "relu"}},
        {"vision_encoder": {"layer": -2}},
        {"vision_encoder": {"norm": False}},
    ],
    ids=str,
)
def test_another_setting_is_noticed(tmp_path, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(deepseek_vl(tmp_path), over=over), ["3:2"])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("processor_config.json", {"num_image_tokens": 9}, "has 16 vision tokens .* writes 9 placeholders"),
        ("preprocessor_config.json", {"do_pad": False}, "sets do_pad=false for its pictures"),
        ("preprocessor_config.json", {"min_size": 64}, "sets min_size=64 for its pictures; it must be 1 to 32"),
        ("preprocessor_config.json", {"crop_to_patches": True}, "sets crop_to_patches=true"),
    ],
)
def test_what_is_not_read(tmp_path, file, changes, words):
    deepseek_vl(tmp_path)
    rewrite_config(tmp_path, file, **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(tmp_path)
