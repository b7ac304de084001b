"""ViP-LLaVA, and LLaVA over several layers, against Transformers' classes and processor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.published import rewrite_config
from tests.support.tiled import check_tiled
from tests.support.vipllava import LAYERS, case
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError


def test_a_photograph(tmp_path):
    imported = check_tiled(case(tmp_path), ["4:1"], is_told=True)
    assert imported.model.config.composition.vision_encoder.layer == (-2, -5, -6, -4)


@pytest.mark.matrix
def test_photographs_of_many_shapes(tmp_path):
    check_tiled(case(tmp_path))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [
        {"is_tied": True},
        {"shard": "40KB"},
        {"vision_feature_layer": -2},
        {"projector_layernorm_eps": 1e-2},
        {"kind": "llava"},
        {"kind": "llava", "vision_feature_layer": [3, -1]},
    ],
    ids=str,
)
def test_ways_to_write_it(tmp_path, changes):
    check_tiled(case(tmp_path, **changes), ["3:2", "1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.matrix
def test_the_first_name_of_the_layers(tmp_path):
    """https://huggingface.co/llava-hf/vip-llava-7b-hf has `vision_feature_layers`."""
    written = case(tmp_path)
    rewrite_config(tmp_path, vision_feature_layers=LAYERS, vision_feature_layer=[-1])
    check_tiled(written, ["2:3"])


@pytest.mark.matrix
@pytest.mark.parametrize(
    "over",
    [
        {"vision_encoder": {"layer": [-5, -2, -6, -4]}},
        {"vision_encoder": {"norm": True}},
        {"vision_tokenizer": {"norm_eps": 1e-2}},
    ],
    ids=str,
)
def test_another_setting_is_noticed(tmp_path, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(case(tmp_path), over=over), ["3:2"])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"projector_hidden_act": "relu"}, "builds only 'gelu'"),
        ({"vision_feature_layer": [-2, 0]}, r"layers \[-2, 0\]; its vision encoder has layers 1 to 6, or -6 to -1"),
    ],
)
def test_what_is_not_read(tmp_path, changes, words):
    case(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(tmp_path)
