"""Cohere2 Vision (Command A Vision), as Transformers writes it.

Source: transformers/models/cohere2_vision, `Cohere2VisionForConditionalGeneration`: modeling_cohere2_vision.py,
processing_cohere2_vision.py and image_processing_cohere2_vision.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import Cohere2VisionConfig

from vlm_cli.checkpoint.published.announcing import read_named_tokens, read_processor
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_grid import (
    GRID_SETTINGS,
    check_tokens_of_a_tile,
    describe_grid_model,
    matches_grid_model,
    read_limits,
)
from vlm_cli.checkpoint.published.layouts.hf_parts import HFParts, read_parts
from vlm_cli.checkpoint.published.settings import Settings
from vlm_cli.schema import show

__all__ = ["HuggingFaceCohere2Vision", "leave_logits_unscaled"]

_SETTINGS = Settings(
    config=Cohere2VisionConfig,
    read={"vision_config", "text_config", "downsample_factor", "alignment_intermediate_size", "image_token_id"},
    without_effect={"tie_word_embeddings", "pad_token_id", "image_token_index"},
)
#: Names of tokens in the tokenizer -> the published tokens.
_TOKENS = {
    "boi_token": "<|START_OF_IMG|>",
    "eoi_token": "<|END_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
}
_PLACEHOLDERS_OF_A_SIDE = 16  # `patch_size` of the image processor: a tile has so many placeholders squared


class HuggingFaceCohere2Vision:
    """A SigLIP, `multi_modal_projector` with a SwiGLU, and a Cohere2, with a `config.json` of type `cohere2_vision`."""

    name = "Cohere2 Vision (Hugging Face)"
    source = "transformers/models/cohere2_vision/modeling_cohere2_vision.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projector's first matrix and the configuration's type."""
        return matches_grid_model(checkpoint, "cohere2_vision")

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`, and texts from the tokenizer: the checkpoint holds all parts."""
        parts = read_parts(checkpoint, _SETTINGS, cuts={*GRID_SETTINGS, "patch_size"}, like={})
        config: Any = parts.config
        read_processor(checkpoint.folder, {})
        tokens = read_named_tokens(checkpoint.folder, _TOKENS)
        side = parts.images.get("patch_size", _PLACEHOLDERS_OF_A_SIDE)
        check_tokens_of_a_tile(checkpoint, parts, config.downsample_factor, side**2)
        parts, notes = leave_logits_unscaled(parts)
        view = f"{{image}}{tokens['img_line_break_token']}"
        return describe_grid_model(
            checkpoint,
            parts,
            vision_encoder={},
            vision_tokenizer={
                "pixel_shuffle": config.downsample_factor,
                "activation": "swiglu",
                "dim_hidden": config.alignment_intermediate_size // 2,
            },
            tiling={
                "choose": "scale",
                "max_tiles": _read_limit(parts.images),
                "picture_text": f"{tokens['boi_token']}{{views}}{tokens['eoi_token']}",
                "tile_text": view,
                "thumbnail_text": view,
            },
            notes=notes,
        )


def _read_limit(images: Mapping[str, Any]) -> int:
    """Read the most number of tiles; the image processor ignores the least."""
    return read_limits(images)["max_tiles"] if images.get("crop_to_patches", True) else 1


def leave_logits_unscaled(parts: HFParts) -> tuple[HFParts, tuple[str, ...]]:
    """Take the factor of the logits from Cohere's language model, and say so.

    Transformers' classes with a vision tower put their own head on the layers, and that head does not apply
    `logit_scale`.
    """
    scale = parts.text_config.get("logit_scale", 1.0)
    if scale == 1:
        return parts, ()
    note = (
        f"Transformers' class leaves out the language model's logit_scale={show(scale)}, and so does vlm. Greedy "
        f"answers are the same either way; to sample as with the scale, multiply the temperature by {1 / scale:g}."
    )
    return replace(parts, text_config={**parts.text_config, "logit_scale": 1.0}), (note,)
