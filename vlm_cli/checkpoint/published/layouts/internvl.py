"""InternVL (https://arxiv.org/abs/2504.10479), as Transformers writes it: the repositories whose names end in `-hf`.

Source: transformers/models/internvl, `InternVLForConditionalGeneration`: modeling_internvl.py and
processing_internvl.py, with transformers/models/got_ocr2/image_processing_got_ocr2.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import InternVLConfig

from vlm_cli.checkpoint.published.announcing import read_named_tokens, read_processor
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_grid import (
    GRID_SETTINGS,
    check_tokens_of_a_tile,
    describe_grid_model,
    matches_grid_model,
    read_layer,
    read_limits,
)
from vlm_cli.checkpoint.published.layouts.hf_parts import HFParts, read_parts
from vlm_cli.checkpoint.published.settings import Settings
from vlm_cli.errors import CheckpointError
from vlm_cli.schema import show

__all__ = ["HuggingFaceInternVL"]

_SETTINGS = Settings(  # Qianfan-OCR has the same
    config=InternVLConfig,
    read={"vision_config", "text_config", "image_token_id", "downsample_ratio", "vision_feature_layer"},
    without_effect={"tie_word_embeddings", "pad_token_id", "image_seq_length"},
    fixed={"projector_hidden_act": ("gelu",), "vision_feature_select_strategy": ("default",)},
)
#: Names of tokens in the tokenizer -> the published tokens.
_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>"}


class HuggingFaceInternVL:
    """An InternViT, `multi_modal_projector` with a norm, and any language model; `config.json` of type `internvl`."""

    name = "InternVL (Hugging Face)"
    source = "transformers/models/internvl/modeling_internvl.py"
    #: What the processor writes around the frames of a clip.
    clip_texts: Mapping[str, str] = {"frame_text": "Frame{number}: {image}", "between_frames_text": "\n"}
    #: Settings of the processor, and their defaults.
    written: Mapping[str, Any] = {"image_seq_length": 256}

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projector's first matrix and the configuration's type."""
        return matches_grid_model(checkpoint, "internvl")

    def read_parts(self, checkpoint: PublishedCheckpoint) -> HFParts:
        """Read the parts. The processor cuts whatever its image processor's file says of `crop_to_patches`."""
        return read_parts(checkpoint, _SETTINGS, cuts=GRID_SETTINGS, like={})

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`, and texts from the tokenizer: the checkpoint holds all parts."""
        parts = self.read_parts(checkpoint)
        config: Any = parts.config
        tokens = read_named_tokens(checkpoint.folder, _TOKENS)
        factor = _read_factor(checkpoint.name, config.downsample_ratio)
        written = read_processor(checkpoint.folder, self.written)["image_seq_length"]
        check_tokens_of_a_tile(checkpoint, parts, factor, written)
        return describe_grid_model(
            checkpoint,
            parts,
            vision_encoder={"layer": read_layer(checkpoint.name, config)},
            vision_tokenizer={"pixel_shuffle": factor, "norm": "layer"},
            tiling={
                **read_limits(parts.images),
                "picture_text": f"{tokens['start_image_token']}{{views}}{tokens['end_image_token']}",
                **self.clip_texts,
            },
        )


def _read_factor(name: str, ratio: float) -> int:
    """Return how many patches of a side become one.

    Raises:
        CheckpointError: if it is no whole number.
    """
    factor = round(1 / ratio) if ratio > 0 else 0
    if not factor or factor * ratio != 1:
        raise CheckpointError(f"{name!r} has downsample_ratio={show(ratio)}; vlm shuffles by 1/2, 1/3 and so on.")
    return factor
