"""A tiny Ovis2 of Transformers' own class, as a published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Ovis2Processor
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiled import TiledCase
from tests.support.tiny import stir

TILE, PATCH = 56, 14
TOKENS = ("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>", "<image>")
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
    "vocab_size": 24,
    "hidden_stride": 2,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": VOCABULARY + 16,  # rows are padded
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@torch.no_grad()
def ovis2(
    folder: Path,
    *,
    is_tied: bool = False,
    shard: str = "5GB",
    images: dict[str, Any] | None = None,
    tokens: tuple[str, ...] = TOKENS,
    **vision: Any,
) -> TiledCase:
    config = Ovis2Config(
        vision_config={**VISION, **vision},
        text_config={**TEXT, "tie_word_embeddings": is_tied},
        tie_word_embeddings=is_tied,
        image_token_id=VOCABULARY,
        visual_indicator_token_ids=[VOCABULARY + 1 + i for i in range(5)],
        vocab_size=TEXT["vocab_size"],
        hidden_size=TEXT["hidden_size"],
    )
    theirs = stir(Ovis2ForConditionalGeneration(config), seed=5)
    theirs.model.vision_tower.head_norm.weight.fill_(2.0)  # shares that differ
    theirs.save_pretrained(folder, max_shard_size=shard)
    square = {"height": TILE, "width": TILE}
    cut = Ovis2ImageProcessorPil(size=square, **{"crop_to_patches": True, "max_patches": 6, **(images or {})})
    of_a_view = (TILE // PATCH // theirs.config.vision_config.hidden_stride) ** 2
    processor = Ovis2Processor(cut, write_tokenizer(folder, *tokens, pad="w0"), image_seq_length=of_a_view)
    processor.save_pretrained(folder)
    return TiledCase(source=folder, model=theirs, processor=processor)
