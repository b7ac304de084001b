"""Aya Vision (https://arxiv.org/abs/2505.08751), as Transformers writes it.

Source: transformers/models/aya_vision, `AyaVisionForConditionalGeneration`: modeling_aya_vision.py and
processing_aya_vision.py, with transformers/models/got_ocr2/image_processing_got_ocr2.py.
"""

from __future__ import annotations

from typing import Any

from transformers import AyaVisionConfig

from vlm_cli.checkpoint.published.announcing import read_processor
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.cohere2_vision import leave_logits_unscaled
from vlm_cli.checkpoint.published.layouts.hf_grid import (
    GRID_SETTINGS,
    check_tokens_of_a_tile,
    describe_grid_model,
    matches_grid_model,
    read_layer,
    read_limits,
)
from vlm_cli.checkpoint.published.layouts.hf_parts import read_parts
from vlm_cli.checkpoint.published.settings import Settings

__all__ = ["HuggingFaceAyaVision"]

_SETTINGS = Settings(
    config=AyaVisionConfig,
    read={
        *("vision_config", "text_config", "downsample_factor", "alignment_intermediate_size", "adapter_layer_norm_eps"),
        *("image_token_index", "image_token_id", "vision_feature_layer"),
    },
    without_effect={"tie_word_embeddings", "pad_token_id", "image_seq_length", "ignore_index", "projector_hidden_act"},
    fixed={"vision_feature_select_strategy": ("full",)},
)
#: Settings of the processor -> Transformers' defaults.
_PROCESSOR = {
    "patch_size": 28,
    "img_size": 364,
    "downsample_factor": 1,
    "start_of_img_token": "<|START_OF_IMG|>",
    "end_of_img_token": "<|END_OF_IMG|>",
    "tile_token": "TILE",
    "tile_global_token": "TILE_GLOBAL",
}
#: What a prompt writes for a picture and for a vision token; a line break, which the processor never writes.
_OTHER_TOKENS = ("image_token", "img_patch_token", "img_line_break_token")


class HuggingFaceAyaVision:
    """A SigLIP, `multi_modal_projector` with a norm and a SwiGLU, and a Cohere2; `config.json` of type `aya_vision`."""

    name = "Aya Vision (Hugging Face)"
    source = "transformers/models/aya_vision/modeling_aya_vision.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projector's first matrix and the configuration's type."""
        return matches_grid_model(checkpoint, "aya_vision")

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`, and texts from the processor: the checkpoint holds all parts."""
        # The processor cuts whatever its image processor's file says of crop_to_patches.
        parts = read_parts(checkpoint, _SETTINGS, cuts=GRID_SETTINGS, like={})
        config: Any = parts.config
        texts = read_processor(checkpoint.folder, _PROCESSOR, _OTHER_TOKENS)
        written = (texts["img_size"] // (texts["patch_size"] * texts["downsample_factor"])) ** 2
        check_tokens_of_a_tile(checkpoint, parts, config.downsample_factor, written)
        parts, notes = leave_logits_unscaled(parts)
        hidden = getattr(config, "alignment_intermediate_size", None) or config.text_config.hidden_size
        return describe_grid_model(
            checkpoint,
            parts,
            vision_encoder={"layer": read_layer(checkpoint.name, config), "norm": False},
            vision_tokenizer={
                "pixel_shuffle": config.downsample_factor,
                "norm": "layer",
                "norm_eps": config.adapter_layer_norm_eps,
                "activation": "swiglu",
                "dim_hidden": hidden // 2,
            },
            tiling={
                **read_limits(parts.images),
                "picture_text": f"{texts['start_of_img_token']}{{views}}{texts['end_of_img_token']}",
                "tile_text": f"{texts['tile_token']}_{{number}}{{image}}",
                "thumbnail_text": f"{texts['tile_global_token']}{{image}}",
            },
            notes=notes,
        )
