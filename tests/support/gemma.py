"""Tiny Gemma 3 and PaliGemma of Transformers' own classes, as published checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiled import TiledCase
from tests.support.tiny import stir

SIZE, PATCH = 56, 14
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
    "vision_use_head": False,
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
SQUARE = {"height": SIZE, "width": SIZE}
BOI, EOI, SOFT = VOCABULARY, VOCABULARY + 1, VOCABULARY + 2


def tokenizer(folder: Path, *added: str, **named: str) -> PreTrainedTokenizerFast:
    write_tokenizer(folder, *added, pad="<pad>")
    return PreTrainedTokenizerFast.from_pretrained(folder, **named)


def gemma3(folder: Path, *, is_tied: bool = True, shard: str = "5GB", **changes: Any) -> TiledCase:
    text = Gemma3TextConfig(
        vocab_size=VOCABULARY + 64,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
        tie_word_embeddings=is_tied,
        **_TEXT,
    )
    ids = {"mm_tokens_per_image": 4, "boi_token_index": BOI, "eoi_token_index": EOI, "image_token_index": SOFT}
    config = Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**_TOWER), tie_word_embeddings=is_tied, **ids | changes
    )
    theirs = stir(Gemma3ForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    images = Gemma3ImageProcessorPil(size=SQUARE)
    images.save_pretrained(folder)
    words = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    named = dict(zip(("boi_token", "eoi_token", "image_token"), words, strict=True))
    tokens = tokenizer(folder, *words, extra_special_tokens=named)
    tokens.save_pretrained(folder)
    processor = Gemma3Processor(images, tokens, image_seq_length=4)
    return TiledCase(
        source=folder, model=theirs, processor=processor, placeholder="<start_of_image>", takes_token_types=True
    )


def paligemma(
    folder: Path, *, text: type[Any] = GemmaConfig, is_tied: bool = True, shard: str = "5GB", **changes: Any
) -> TiledCase:
    more = {"sliding_window": 12, "query_pre_attn_scalar": 8} if text is Gemma2Config else {}
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**_TOWER),
        text_config=text(vocab_size=VOCABULARY + 64, tie_word_embeddings=is_tied, **_TEXT, **more),
        image_token_index=VOCABULARY + 1,
        bos_token_id=VOCABULARY,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=is_tied,
        **changes,
    )
    theirs = stir(PaliGemmaForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = (SIZE // PATCH) ** 2
    images.save_pretrained(folder)
    tokens = tokenizer(folder, "<bos>", "<image>", bos_token="<bos>", add_bos_token=True)
    tokens.save_pretrained(folder)
    processor = PaliGemmaProcessor(images, tokens)
    return TiledCase(source=folder, model=theirs, processor=processor, takes_token_types=True)


def paligemma2(folder: Path, **changes: Any) -> TiledCase:
    return paligemma(folder, text=Gemma2Config, **changes)
