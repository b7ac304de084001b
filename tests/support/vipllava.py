"""A tiny ViP-LLaVA of Transformers' own class, and a LLaVA over several layers, as published checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiled import TiledCase
from tests.support.tiny import stir

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
