"""Tiny checkpoints of Transformers' models that cut pictures into a grid and shuffle pixels before an MLP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.cohere2_vision.image_processing_cohere2_vision import get_optimal_tiled_canvas
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiled import TiledCase
from tests.support.tiny import stir

TILE, PATCH = 32, 8  # pixels; 2 x 2 vision tokens for each tile

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY + 24,  # rows are padded
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
SQUARE = {"height": TILE, "width": TILE}


class Cohere2VisionImageProcessorPil(GotOcr2ImageProcessorPil):
    """Cohere2's image processor with Pillow: Transformers has it with torchvision alone."""

    crop_to_patches = True

    def crop_image_to_patches(self, *args: Any, **kwargs: Any) -> Any:
        choose = image_processing_pil_got_ocr2.get_optimal_tiled_canvas
        image_processing_pil_got_ocr2.get_optimal_tiled_canvas = get_optimal_tiled_canvas
        try:
            return super().crop_image_to_patches(*args, **kwargs)
        finally:
            image_processing_pil_got_ocr2.get_optimal_tiled_canvas = choose


COHERE_TOKENS = {
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "image_token": "<|IMG_PATCH|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}


def cohere2_text(*, is_tied: bool, **changes: Any) -> Cohere2Config:
    return Cohere2Config(**TEXT, tie_word_embeddings=is_tied, sliding_window=8, **changes)


def cohere2_vision(
    folder: Path, *, is_tied: bool = True, shard: str = "5GB", images: dict[str, Any] | None = None, **changes: Any
) -> TiledCase:
    side = changes.pop("tokens_of_a_side", 2)
    config = Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**TOWER | {"vision_use_head": False} | changes.pop("vision", {})),
        text_config=cohere2_text(is_tied=is_tied, eos_token_id=1, **changes.pop("text", {})),
        tie_word_embeddings=is_tied,
        image_token_id=VOCABULARY + 2,
        alignment_intermediate_size=48,
        **changes,
    )
    theirs = stir(Cohere2VisionForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    tokenizer = write_tokenizer(folder, *COHERE_TOKENS.values(), pad="w0", named=COHERE_TOKENS)
    processor = Cohere2VisionProcessor(
        Cohere2VisionImageProcessorPil(size=SQUARE, **{"patch_size": side} | (images or {})), tokenizer
    )
    processor.save_pretrained(folder)
    return TiledCase(source=folder, model=theirs, processor=processor, placeholder="<|IMG_PATCH|>")


def aya_vision(
    folder: Path, *, is_tied: bool = True, shard: str = "5GB", images: dict[str, Any] | None = None, **changes: Any
) -> TiledCase:
    side = changes.pop("tokens_of_a_side", 2)
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=cohere2_text(is_tied=is_tied, eos_token_id=1, **changes.pop("text", {})),
        tie_word_embeddings=is_tied,
        image_token_index=VOCABULARY + 2,
        **{"alignment_intermediate_size": 48} | changes,
    )
    theirs = stir(AyaVisionForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    tiles = ["TILE_GLOBAL", *(f"TILE_{i}" for i in range(1, 13))]
    tokenizer = write_tokenizer(folder, *COHERE_TOKENS.values(), *tiles, pad="w0")
    # The file of published models has crop_to_patches=false, which the processor overrules.
    image_processor = GotOcr2ImageProcessorPil(size=SQUARE, **{"crop_to_patches": False} | (images or {}))
    processor = AyaVisionProcessor(image_processor, tokenizer, patch_size=TILE // side, img_size=TILE)
    processor.save_pretrained(folder)
    return TiledCase(source=folder, model=theirs, processor=processor)


INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def internvl(
    folder: Path, *, is_tied: bool = False, shard: str = "5GB", images: dict[str, Any] | None = None, **changes: Any
) -> TiledCase:
    vision = InternVLVisionConfig(
        **TOWER | {"image_size": [TILE] * 2, "patch_size": [PATCH] * 2} | changes.pop("vision", {})
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        image_token_id=VOCABULARY + 2,
        image_seq_length=4,
        **changes,
    )
    theirs = stir(InternVLForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    tokenizer = write_tokenizer(folder, *INTERNVL_TOKENS.values(), pad="w0", named=INTERNVL_TOKENS)
    # The files of published models have crop_to_patches=false, which the processor overrules.
    image_processor = GotOcr2ImageProcessorPil(size=SQUARE, **{"crop_to_patches": False} | (images or {}))
    side = round((TILE // PATCH) * config.downsample_ratio)
    processor = InternVLProcessor(
        image_processor, tokenizer, InternVLVideoProcessor(), image_seq_length=side**2, chat_template="{{ messages }}"
    )
    processor.save_pretrained(folder)
    return TiledCase(source=folder, model=theirs, processor=processor, placeholder="<IMG_CONTEXT>")


def qianfan_ocr(
    folder: Path, *, is_tied: bool = False, shard: str = "5GB", images: dict[str, Any] | None = None, **changes: Any
) -> TiledCase:
    from transformers import (  # the oldest release may lack it
        QianfanOCRConfig,
        QianfanOCRForConditionalGeneration,
        QianfanOCRProcessor,
        QianfanOCRVisionConfig,
    )

    vision = QianfanOCRVisionConfig(
        **TOWER | {"image_size": [TILE] * 2, "patch_size": [PATCH] * 2} | changes.pop("vision", {})
    )
    config = QianfanOCRConfig(
        vision_config=vision,
        text_config=Qwen3Config(**TEXT, head_dim=16, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        image_token_id=VOCABULARY + 2,
        image_seq_length=4,
        **changes,
    )
    theirs = stir(QianfanOCRForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    names = {key: x for key, x in INTERNVL_TOKENS.items() if key != "video_token"}
    tokenizer = write_tokenizer(folder, *names.values(), pad="w0", named=names)
    image_processor = GotOcr2ImageProcessorPil(size=SQUARE, **{"crop_to_patches": True} | (images or {}))
    side = round((TILE // PATCH) * config.downsample_ratio)
    processor = QianfanOCRProcessor(image_processor, tokenizer, image_seq_length=side**2)
    processor.save_pretrained(folder)
    return TiledCase(source=folder, model=theirs, processor=processor)
