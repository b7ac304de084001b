"""ViP-LLaVA, and LLaVA over several layers, against Transformers' classes and processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.support.grid_models import PATCH, TEXT, TILE, TOWER
from tests.support.published import VOCABULARY, rewrite_config, write_tokenizer
from tests.support.tiled import TiledCase, check_tiled
from tests.support.tiny import stir
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError

LAYERS = [-2, -5, -6, 3]
MODELS: dict[str, tuple[Any, Any]] = {
    "vipllava": (VipLlavaConfig, VipLlavaForConditionalGeneration),
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
}


def case(
    folder: Path, kind: str = "vipllava", *, is_tied: bool = False, shard: str = "5GB", **changes: Any
) -> TiledCase:
    kinds = MODELS[kind]
    config = kinds[0](
        vision_config=CLIPVisionConfig(**TOWER | {"num_hidden_layers": 6}, projection_dim=24),
        text_config=LlamaConfig(**TEXT, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        image_token_index=VOCABULARY,
        image_seq_length=16,
        **{"vision_feature_layer": LAYERS} | changes,
    )
    theirs = stir(kinds[1](config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size=TILE),
        write_tokenizer(folder, "<image>", pad="<pad>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return TiledCase(source=folder, model=theirs, processor=processor)


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
