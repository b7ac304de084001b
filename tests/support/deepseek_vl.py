"""A tiny DeepSeek-VL of Transformers' own class, as a published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    LlamaConfig,
    SiglipVisionConfig,
)
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

from tests.support.grid_models import PATCH, SQUARE, TEXT, TILE, TOWER
from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiled import TiledCase
from tests.support.tiny import stir

TOKEN = "<image_placeholder>"


def deepseek_vl(
    folder: Path, *, is_tied: bool = True, shard: str = "5GB", has_head: bool = False, **images: Any
) -> TiledCase:
    config = DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=has_head),
        text_config=LlamaConfig(**TEXT, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        image_token_id=VOCABULARY,
    )
    theirs = stir(DeepseekVLForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    tokenizer = write_tokenizer(folder, TOKEN, pad="w0", named={"image_token": TOKEN})
    pixels = DeepseekVLImageProcessorPil(size=SQUARE, **images)
    pixels.save_pretrained(folder)
    processor = DeepseekVLProcessor(pixels, tokenizer, num_image_tokens=(TILE // PATCH) ** 2)
    processor.save_pretrained(folder)
    return TiledCase(source=folder, model=theirs, processor=processor, placeholder=TOKEN)
