"""Idefics3 (https://arxiv.org/abs/2408.12637) and SmolVLM (https://arxiv.org/abs/2504.05299) of Transformers.

Sources: transformers/models/idefics3, transformers/models/smolvlm. Both have the same parts under the same names. Their
vision encoder is a SigLIP that also reads padded images of other shapes; vlm gives it whole tiles, which a plain SigLIP
reads the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import Idefics3Config, PreTrainedConfig, SmolVLMConfig

from vlm_cli.checkpoint.parts.plain_types import PLAIN_TYPES, order_positions
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_parts import HFParts, make_language_model_rules, read_parts
from vlm_cli.checkpoint.published.settings import Settings
from vlm_cli.checkpoint.published.targets import Rule, Target, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.schema import show

__all__ = ["HuggingFaceIdefics3", "HuggingFaceSmolVLM"]

_FENCE = "<fake_token_around_image>"
_WHOLE = f"{_FENCE}<global-img>{{image}}{_FENCE}"
#: What both processors write around and between the views of a picture.
_TEXTS = {
    "tile_text": f"{_FENCE}<row_{{row}}_col_{{column}}>{{image}}",
    "row_end_text": "\n",
    "thumbnail_text": f"\n{_WHOLE}",
    "whole_text": _WHOLE,
}
#: Settings of the image processor that say how a picture is cut; `do_pad` pads the pixels of a batch, and clips are
#: sampled as a prompt says.
_CUTS = {"size", "max_image_size", "do_image_splitting", "do_pad", "return_row_col_info", "video_sampling"}
_LIKE = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "lanczos"}
_TOWER = "vision_encoder.visual."
_POSITIONS = "embeddings.position_embedding.weight"
_RULES: list[Rule] = [
    (
        rf"model\.vision_model\.({re.escape(_POSITIONS)})",
        lambda match: [Target(_TOWER + match[1], transform=order_positions)],
    ),
    (r"model\.vision_model\.(.*)", rf"{_TOWER}\1"),
    (r"model\.connector\.modality_projection\.proj\.weight", "vision_tokenizer.proj.weight"),
]


class HuggingFaceIdefics3:
    """`vision_model`, `connector` and `text_model`, with a `config.json` of type `idefics3`."""

    name = "Idefics3 (Hugging Face)"
    source = "transformers/models/idefics3/modeling_idefics3.py"
    model_type = "idefics3"
    config: type[PreTrainedConfig] = Idefics3Config
    longest_edge, tile = 4 * 364, 364  # pixels, where no file says it
    clip_texts: Mapping[str, str] = {}  # it reads no clips

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projection and the configuration's type."""
        has_projection = "model.connector.modality_projection.proj.weight" in checkpoint.tensors
        return has_projection and checkpoint.config.get("model_type") == self.model_type

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts, and its tokenizer has `<image>`."""
        settings = Settings(
            config=self.config,
            read={"vision_config", "text_config", "image_token_id", "scale_factor"},
            without_effect={"tie_word_embeddings", "pad_token_id"},
        )
        parts = read_parts(checkpoint, settings, cuts=_CUTS, like=_LIKE)
        config: Any = parts.config
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {"name": f"hf:{checkpoint.name}"},
                "vision_tokenizer": {"type": "linear", "bias": False, "pixel_shuffle": config.scale_factor},
                "fusion": "language-stream",
                "tiling": {
                    "type": "split",
                    "longest_edge": self._read_edge(checkpoint.name, parts),
                    **_TEXTS,
                    **self.clip_texts,
                },
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "language_model"],
            },
            targets_for=lambda ours: make_targets_of(
                [*_RULES, *make_language_model_rules(checkpoint, ours, under="text_model")]
            ),
            text_config=parts.text_config,
            vision_config=_convert_tower(parts.vision_config),
            first_added_id=config.image_token_id,
        )

    def _read_edge(self, name: str, parts: HFParts) -> int:
        """Read the pixels of a picture's longer side.

        Raises:
            CheckpointError: if pictures are not cut, or a tile is not what the vision encoder reads.
        """
        images, config = parts.images, parts.config
        if images.get("do_image_splitting", True) is not True:
            raise CheckpointError(
                f"{name!r} has do_image_splitting={show(images['do_image_splitting'])}; vlm reads the models that cut "
                "pictures into tiles. Set it to true in preprocessor_config.json, and add --set tiling.max_tiles=1."
            )
        tile = _read_longest(images.get("max_image_size"), self.tile)
        reads: Any = config.vision_config.image_size
        if tile != reads:
            raise CheckpointError(
                f"{name!r} has tiles of {show(tile)} pixels (max_image_size), and its vision encoder reads "
                f"{show(reads)}."
            )
        return _read_longest(images.get("size"), self.longest_edge)


class HuggingFaceSmolVLM(HuggingFaceIdefics3):
    """Idefics3's parts, with a `config.json` of type `smolvlm`."""

    name = "SmolVLM (Hugging Face)"
    source = "transformers/models/smolvlm/modeling_smolvlm.py"
    model_type = "smolvlm"
    config = SmolVLMConfig
    clip_texts: Mapping[str, str] = {
        "clip_text": "You are provided the following series of {frames_in_words} frames from a {duration} [H:MM:SS] "
        "video.\n{views}\n\n",
        "frame_text": "\nFrame from {time}:{image}",
    }


def _convert_tower(vision_config: dict[str, Any]) -> dict[str, Any]:
    """Make a plain SigLIP of a vision encoder's configuration."""
    own = vision_config["config"]
    return {**vision_config, "config": PLAIN_TYPES[own["model_type"]].convert_settings(own)}


def _read_longest(size: Any, default: int) -> Any:
    """Return the pixels of the longer side that a setting of an image processor names."""
    return size.get("longest_edge", default) if isinstance(size, Mapping) else default
