"""Tiny LLaVA-NeXT and LLaVA-OneVision of Transformers' own classes, as published checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiled import TiledCase
from tests.support.tiny import stir

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


def llava_next_video(folder: Path, *, is_tied: bool = False, shard: str = "5GB", **changes: Any) -> TiledCase:
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**_TOWER, projection_dim=24),
        text_config=LlamaConfig(**_TEXT, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        video_token_index=VOCABULARY,
        image_token_index=VOCABULARY + 1,
        image_grid_pinpoints=PINPOINTS,
        **changes,
    )
    theirs = stir(LlavaNextVideoForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    images = LlavaNextImageProcessorPil(size={"shortest_edge": TILE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    images.save_pretrained(folder)
    processor = LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(size={"shortest_edge": TILE}, crop_size=SQUARE),
        image_processor=images,
        tokenizer=write_tokenizer(folder, "<video>", "<image>", pad="<pad>"),
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
