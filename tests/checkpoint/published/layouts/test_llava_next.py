"""LLaVA-NeXT and LLaVA-OneVision, against Transformers' classes and processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.support.published import VOCABULARY, rewrite_config, write_tokenizer
from tests.support.tiled import TiledCase, check_tiled
from tests.support.tiny import stir
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError

TILE, PATCH = 56, 14
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
}
_TEXT = {
    "vocab_size": VOCABULARY + 8,  # rows are padded
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
SQUARE = {"height": TILE, "width": TILE}


def llava_next(folder: Path, *, is_tied: bool = False, shard: str = "5GB", **changes: Any) -> TiledCase:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_TOWER, projection_dim=24),
        text_config=LlamaConfig(**_TEXT, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        image_token_index=VOCABULARY,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(TILE // PATCH) ** 2,
        **changes,
    )
    theirs = stir(LlavaNextForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    images = LlavaNextImageProcessorPil(size={"shortest_edge": TILE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    images.save_pretrained(folder)
    processor = LlavaNextProcessor(
        images,
        write_tokenizer(folder, "<image>", pad="<pad>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return TiledCase(source=folder, model=theirs, processor=processor)


def llava_onevision(folder: Path, *, is_tied: bool = False, shard: str = "5GB", **changes: Any) -> TiledCase:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_TOWER, vision_use_head=False),
        text_config=Qwen2Config(**_TEXT, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        image_token_index=VOCABULARY,
        video_token_index=VOCABULARY + 1,
        image_grid_pinpoints=PINPOINTS,
        **{"vision_aspect_ratio": "anyres_max_2"} | changes,
    )
    theirs = stir(LlavaOnevisionForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    images.save_pretrained(folder)
    processor = LlavaOnevisionProcessor(
        images,
        write_tokenizer(folder, "<image>", "<video>", pad="<pad>"),
        LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    return TiledCase(source=folder, model=theirs, processor=processor)


MADE = {"llava_next": llava_next, "llava_onevision": llava_onevision}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MADE)
def test_photographs_of_many_shapes(tmp_path, kind):
    check_tiled(MADE[kind](tmp_path), is_told=True)


def test_a_panorama(tmp_path):
    """The quick case of the two tests around it: its tiles shrink."""
    check_tiled(llava_onevision(tmp_path), ["4:1"])


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("changes", [{"is_tied": True}, {"shard": "40KB"}, {"vision_feature_layer": -2}], ids=str)
def test_ways_to_write_it(tmp_path, kind, changes):
    imported = check_tiled(MADE[kind](tmp_path, **changes), ["3:2", "1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)
    assert imported.model.config.composition.tiling.options.unpad


def test_pinpoints_that_differ_are_refused(tmp_path):
    llava_next(tmp_path)
    rewrite_config(tmp_path, "preprocessor_config.json", image_grid_pinpoints=PINPOINTS[:2])
    with pytest.raises(CheckpointError, match="other image_grid_pinpoints"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_layer": [-2, -1]}, r"layers \[-2, -1\]"),
        ({"vision_aspect_ratio": "anyres"}, "anyres_max_ and"),
    ],
)
def test_what_is_not_read(tmp_path, changes, words):
    llava_onevision(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(tmp_path)
