"""Ovis2 (https://arxiv.org/abs/2405.20797), as Transformers writes it.

Source: transformers/models/ovis2, `Ovis2ForConditionalGeneration`: modeling_ovis2.py, processing_ovis2.py and
image_processing_ovis2.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from transformers import Ovis2Config, Ovis2VisionConfig

from vlm_cli.checkpoint.parts.plain_types import PLAIN_TYPES
from vlm_cli.checkpoint.published.announcing import read_processor
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_grid import GRID_SETTINGS, read_limits
from vlm_cli.checkpoint.published.layouts.hf_parts import MODEL, HFParts, read_parts
from vlm_cli.checkpoint.published.settings import Settings, check_settings_of
from vlm_cli.checkpoint.published.targets import Rule, Target, TargetsOf, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.schema import show

__all__ = ["HuggingFaceOvis2"]

_AIMV2 = PLAIN_TYPES["ovis2_vision"]
_SETTINGS = Settings(
    config=Ovis2Config,
    read={"vision_config", "text_config", "image_token_id", "visual_indicator_token_ids", "vocab_size", "hidden_size"},
    without_effect={"tie_word_embeddings", "pad_token_id"},
)
_VISION = Settings(
    config=Ovis2VisionConfig,
    read={*_AIMV2.settings, "vocab_size", "hidden_stride", "num_visual_indicator_tokens"},
    without_effect={"backbone_config"},
    fixed={"tokenize_function": ("softmax",)},
)
_TEXTS = {
    "picture_text": "<IMG_START>{views}<IMG_END>",
    "thumbnail_text": "{image}<IMG_GRID>",
    "between_tiles_text": "<IMG_COL>",
    "between_rows_text": "<IMG_ROW>",
}
_EMBEDDING, _HEAD = "lang_model.model.embed_tokens.weight", "lang_model.lm_head.weight"


class HuggingFaceOvis2:
    """An AIMv2 whose patches become shares of a visual vocabulary, and rows of `visual_embeddings_table`."""

    name = "Ovis2 (Hugging Face)"
    source = "transformers/models/ovis2/modeling_ovis2.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the table of the visual vocabulary and the configuration's type."""
        has_table = any(name.endswith("visual_embeddings_table.weight") for name in checkpoint.tensors)
        return has_table and checkpoint.config.get("model_type") == "ovis2"

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts."""
        check_settings_of(checkpoint.name, "vision_config", checkpoint.config.get("vision_config") or {}, _VISION)
        cuts = {*GRID_SETTINGS, "use_covering_area_grid"}
        parts = read_parts(checkpoint, _SETTINGS, cuts=cuts, like={})
        vision: dict[str, Any] = parts.vision_config["config"]
        num_words = vision["vocab_size"] - vision["num_visual_indicator_tokens"]
        _check_tokens_of_a_view(checkpoint, parts)
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {"name": f"hf:{checkpoint.name}"},
                "vision_tokenizer": {
                    "type": "mlp",
                    "pixel_shuffle": vision["hidden_stride"],
                    "bias": False,
                    "hidden_norm": "layer",
                    "activation": "softmax",
                    "dim_hidden": num_words,
                },
                "fusion": "language-stream",
                "tiling": {"type": "grid", **_read_tiling(parts), "thumbnail": "first", **_TEXTS},
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "language_model"],
            },
            targets_for=lambda _: _make_targets(checkpoint, parts, num_words),
            # Rows of the visual vocabulary stand in the embedding, and not in the head.
            text_config={**parts.text_config, "tie_word_embeddings": False},
            vision_config={
                **parts.vision_config,
                "config": _AIMV2.convert_settings(vision),
            },
            optional_pattern=r"added_tokens\..*",
        )


def _check_tokens_of_a_view(checkpoint: PublishedCheckpoint, parts: HFParts) -> None:
    """Refuse a processor that writes another number of placeholders for a view than the model has vision tokens.

    Raises:
        CheckpointError: with both numbers.
    """
    vision = parts.vision_config["config"]
    written = read_processor(checkpoint.folder, {"image_seq_length": 256, "image_token": MEDIA_TOKEN})
    tokens = (vision["image_size"] // vision["patch_size"] // vision["hidden_stride"]) ** 2
    if written["image_seq_length"] != tokens:
        raise CheckpointError(
            f"{checkpoint.name!r} has {tokens} vision tokens for each view, and its processor writes "
            f"{show(written['image_seq_length'])} placeholders. Restore the published files."
        )


def _read_tiling(parts: HFParts) -> dict[str, Any]:
    """Read how pictures are cut."""
    if not parts.images.get("crop_to_patches", False):
        return {"max_tiles": 1}
    limits = read_limits(parts.images)
    if parts.images.get("use_covering_area_grid", True):
        return {"choose": "cover", "max_tiles": limits["max_tiles"]}
    return limits


def _make_targets(checkpoint: PublishedCheckpoint, parts: HFParts, num_words: int) -> TargetsOf:
    """Make the lookup of targets.

    The model reads the last rows of the visual vocabulary where a prompt has `<IMG_START>` and its like, so they take
    the place of these tokens' rows in the embedding.

    Args:
        checkpoint: names and shapes.
        parts: its configurations.
        num_words: rows of the visual vocabulary that are shared out to patches.
    """
    announced: Sequence[int] = parts.config.visual_indicator_token_ids
    rows = _find_rows_without(announced, parts.text_config["vocab_size"])
    has_head = any(name.endswith("lm_head.weight") for name in checkpoint.tensors)

    def to_embedding(match: re.Match[str]) -> list[Target]:
        found = [Target(_EMBEDDING, target_rows=part, source_rows=part) for part in rows]
        return found if has_head else [*found, Target(_HEAD)]

    def to_words(match: re.Match[str]) -> list[Target]:
        found = [
            Target("vision_tokenizer.proj.3.weight", source_rows=slice(num_words), transform=Tensor.t, restore=Tensor.t)
        ]
        for i, token in enumerate(announced):
            row = num_words + i
            found.append(Target(_EMBEDDING, target_rows=slice(token, token + 1), source_rows=slice(row, row + 1)))
        return found

    rules: list[Rule] = [
        (
            rf"{MODEL}vision_tower\.transformer\.embeddings\.patch_embedding\.(\w+)",
            r"vision_encoder.visual.embeddings.patch_embed.\1",
        ),
        (rf"{MODEL}vision_tower\.transformer\.(.*)", r"vision_encoder.visual.\1"),
        (rf"{MODEL}vision_tower\.head_linear\.weight", "vision_tokenizer.proj.0.weight"),
        (rf"{MODEL}vision_tower\.head_norm\.(\w+)", r"vision_tokenizer.proj.1.\1"),
        (rf"{MODEL}visual_embeddings_table\.weight", to_words),
        (rf"{MODEL}language_model\.(?:model\.)?embed_tokens\.weight", to_embedding),
        (r"(?:language_model\.)?lm_head\.weight", _HEAD),
        (rf"{MODEL}language_model\.(?:model\.)?(layers\..*|norm\..*)", r"lang_model.model.\1"),
    ]
    return make_targets_of(rules)


def _find_rows_without(tokens: Sequence[int], num_rows: int) -> list[slice]:
    """Return the ranges of a table's rows that belong to none of these tokens.

    >>> _find_rows_without([3, 4], 6)
    [slice(0, 3, None), slice(5, 6, None)]
    """
    ends = [-1, *sorted(tokens), num_rows]
    return [slice(a + 1, b) for a, b in pairwise(ends) if b > a + 1]
