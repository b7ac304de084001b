"""A tiny Perception-LM of Transformers' own class, as a published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    BatchFeature,
    LlamaConfig,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PerceptionLMProcessor,
    PerceptionLMVideoProcessor,
)
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.support.grid_models import TEXT
from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiled import TiledCase
from tests.support.tiny import stir

TILE, PATCH = 112, 28  # pixels; 2 x 2 vision tokens for each tile
SQUARE = {"height": TILE, "width": TILE}
TOKENS = {"image_token": "<|image|>", "video_token": "<|video|>"}
ARGS: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "img_size": [TILE, TILE],
    "patch_size": PATCH,
    "ref_feat_shape": [4, 4],
    "global_pool": "",
    "use_post_transformer_norm": False,
    "init_values": 0.1,
}


class PerceptionLMImageProcessorPil(GotOcr2ImageProcessorPil):
    """Perception-LM's image processor with Pillow: Transformers has it with torchvision alone."""

    def __init__(self, **kwargs: Any) -> None:
        half = [0.5] * 3
        super().__init__(
            size={"height": TILE, "width": TILE}, image_mean=half, image_std=half, tile_size=TILE, **kwargs
        )

    def _preprocess(self, images: list[np.ndarray], **settings: Any) -> BatchFeature:
        chooser = PerceptionLMImageProcessor(max_num_tiles=getattr(self, "max_num_tiles", 36))
        found = []
        for image in images:
            height, width = image.shape[-2:]
            sizes = {"img_width": width, "img_height": height, "tile_size": TILE}
            columns, rows = chooser._fit_image_to_canvas(**sizes) or chooser._find_closest_aspect_ratio(**sizes)
            views = [self.resize(image, SizeDict(height=TILE, width=TILE), settings["resample"])]
            if getattr(self, "vision_input_type", "thumb+tile") == "thumb+tile":
                canvas = self.resize(image, SizeDict(height=TILE * rows, width=TILE * columns), settings["resample"])
                bands = [band for row in np.split(canvas, rows, axis=1) for band in np.split(row, columns, axis=2)]
                views += bands
            scaled = [self.rescale(view, settings["rescale_factor"]) for view in views]
            found.append([self.normalize(x, settings["image_mean"], settings["image_std"]) for x in scaled])
        return BatchFeature({"pixel_values": np.array(found)}, tensor_type=settings["return_tensors"])


def case(
    folder: Path,
    *,
    is_tied: bool = True,
    shard: str = "5GB",
    images: dict[str, Any] | None = None,
    args: dict[str, Any] | None = None,
    **changes: Any,
) -> TiledCase:
    vision = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336"}
    changes = {"projector_pooling_ratio": 2} | changes
    config = PerceptionLMConfig(
        vision_config=vision | {"model_args": ARGS | (args or {})},
        text_config=LlamaConfig(**TEXT, tie_word_embeddings=is_tied),
        image_token_id=VOCABULARY,
        video_token_id=VOCABULARY + 1,
        tie_word_embeddings=is_tied,
        **changes,
    )
    theirs = stir(PerceptionLMForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    tokenizer = write_tokenizer(folder, *TOKENS.values(), pad="w0", named=TOKENS)
    ratio, more = changes["projector_pooling_ratio"], images or {}
    written, processor = (
        PerceptionLMProcessor(PerceptionLMVideoProcessor(), x, tokenizer, patch_size=PATCH, pooling_ratio=ratio)
        for x in (PerceptionLMImageProcessor(tile_size=TILE, **more), PerceptionLMImageProcessorPil(**more))
    )
    written.save_pretrained(folder)
    return TiledCase(source=folder, model=theirs, processor=processor, placeholder="<|image|>")
