"""A tiny GOT-OCR 2.0 of Transformers' own class, as a published checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, GotOcr2Processor, Qwen2Config
from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.support.grid_models import PATCH, TEXT, TILE
from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiled import TiledCase
from tests.support.tiny import stir

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "output_channels": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
    "window_size": 3,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
}
TOKENS = ("<img>", "</img>", "<imgpad>", "<|im_start|>", "<|im_end|>")


def got_ocr2(
    folder: Path,
    *,
    is_tied: bool = True,
    shard: str = "5GB",
    size: int = TILE,
    crops: bool = False,
    images: dict[str, Any] | None = None,
    **vision: Any,
) -> TiledCase:
    config = GotOcr2Config(
        vision_config=GotOcr2VisionConfig(**TOWER | {"image_size": size} | vision),
        text_config=Qwen2Config(**TEXT, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        image_token_index=VOCABULARY + TOKENS.index("<imgpad>"),
    )
    theirs = stir(GotOcr2ForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    tokenizer = write_tokenizer(folder, *TOKENS, pad="w0")
    pixels = GotOcr2ImageProcessorPil(**{"size": {"height": size, "width": size}} | (images or {}))
    processor = GotOcr2Processor(pixels, tokenizer)
    processor.save_pretrained(folder)
    side = -(-size // PATCH // 2)  # of the tokens after one convolution
    reads = partial(processor, num_image_tokens=(-(-side // 2)) ** 2, crop_to_patches=crops)
    return TiledCase(source=folder, model=theirs, processor=reads, placeholder="<img><imgpad></img>")
