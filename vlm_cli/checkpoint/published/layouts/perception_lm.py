"""Perception-LM (https://arxiv.org/abs/2504.13180), as Transformers writes it.

Source: transformers/models/perception_lm, `PerceptionLMForConditionalGeneration`: modeling_perception_lm.py,
processing_perception_lm.py and image_processing_perception_lm.py, with timm/models/eva.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PerceptionLMConfig

from vlm_cli.checkpoint.published.announcing import read_processor
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_parts import MODEL, HFParts, make_language_model_rules, read_parts
from vlm_cli.checkpoint.published.settings import Settings
from vlm_cli.checkpoint.published.targets import Rule, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.schema import show
from vlm_cli.timm_sizes import TIMM_SIZES

__all__ = ["HuggingFacePerceptionLM"]

_SETTINGS = Settings(
    config=PerceptionLMConfig,
    # vlm leaves out the class token of every encoder that has one, as vision_use_cls_token says.
    read={"vision_config", "text_config", "projector_pooling_ratio", "image_token_id", "vision_use_cls_token"},
    without_effect={"video_token_id", "tie_word_embeddings", "pad_token_id"},
)
#: Settings of the image processor that say how a picture is cut. `size` is a relic: `tile_size` counts.
_CUTS = {"vision_input_type", "tile_size", "max_num_tiles", "size"}
_PIXELS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
_PROJECTOR: list[Rule] = [
    (rf"{MODEL}multi_modal_projector\.linear_1\.(\w+)", r"vision_tokenizer.proj.0.\1"),
    (rf"{MODEL}multi_modal_projector\.linear_2\.(\w+)", r"vision_tokenizer.proj.2.\1"),
    (rf"{MODEL}vision_tower\.timm_model\.(.*)", r"vision_encoder.visual.trunk.\1"),
]


class HuggingFacePerceptionLM:
    """timm's Perception Encoder, an MLP, a pooling and a Llama, with a `config.json` of type `perception_lm`."""

    name = "Perception-LM (Hugging Face)"
    source = "transformers/models/perception_lm/modeling_perception_lm.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projector's first matrix and the configuration's type."""
        return checkpoint.config.get("model_type") == "perception_lm" and any(
            re.fullmatch(rf"{MODEL}multi_modal_projector\.linear_1\.weight", name) for name in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts."""
        tower = _read_tower(checkpoint)
        parts = read_parts(
            checkpoint, _SETTINGS, cuts=_CUTS, like=_PIXELS, image_size=tower["vision_cfg"]["image_size"]
        )
        config: Any = parts.config
        _check_processor(checkpoint, parts, tower)
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {"name": f"timm:{tower['name']}"},
                "vision_tokenizer": {"type": "mlp", "pool": config.projector_pooling_ratio, "pool_at": "after"},
                "fusion": "language-stream",
                "tiling": _read_tiling(checkpoint.name, parts.images),
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "language_model"],
            },
            targets_for=lambda ours: make_targets_of(
                [*_PROJECTOR, *make_language_model_rules(checkpoint, ours, has_added_rows=False)]
            ),
            text_config=parts.text_config,
            vision_config={**tower, "preprocess": parts.vision_config["preprocess"]},
            optional_pattern=r"added_tokens\..*",
        )


def _read_tower(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    """Read the vision encoder: a model of timm, and the sizes in which it differs from timm's.

    Raises:
        CheckpointError: for another encoder, or an argument that is no size.
    """
    vision = checkpoint.config.get("vision_config") or {}
    args = dict(vision.get("model_args") or {})
    if vision.get("model_type", "timm_wrapper") != "timm_wrapper" or not isinstance(vision.get("architecture"), str):
        raise CheckpointError(
            f"{checkpoint.name!r} has a vision encoder of type {show(vision.get('model_type'))}; vlm reads models of "
            "timm, of type timm_wrapper with an architecture."
        )
    if more := sorted(set(args) - set(TIMM_SIZES)):
        raise CheckpointError(
            f"{checkpoint.name!r} has vision_config.model_args.{more[0]}={show(args[more[0]])}; vlm reads "
            f"{', '.join(TIMM_SIZES)}."
        )
    size = args.get("img_size") or re.search(r"_(\d+)$", vision["architecture"])
    sides = {int(size[1])} if isinstance(size, re.Match) else set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1 or None in sides:
        raise CheckpointError(f"{checkpoint.name!r} has img_size={show(args.get('img_size'))}; vlm cuts squares.")
    return {
        "type": "timm",
        "name": vision["architecture"].partition(".")[0],
        "args": args,
        "vision_cfg": {"image_size": sides.pop()},
    }


def _read_tiling(name: str, images: Mapping[str, Any]) -> dict[str, Any]:
    """Read how pictures are cut.

    Raises:
        CheckpointError: for a way that the image processor does not have.
    """
    kind = images.get("vision_input_type", "thumb+tile")
    if kind != "thumb+tile":
        return {"type": "none"}  # the image processor does so for every other word
    most = images.get("max_num_tiles", 36)
    if not isinstance(most, int) or most < 1:
        raise CheckpointError(f"the image processor of {name!r} has max_num_tiles={show(most)}; give 1 or more.")
    return {"type": "grid", "choose": "largest", "thumbnail": "first", "thumbnail_always": True, "max_tiles": most}


def _check_processor(checkpoint: PublishedCheckpoint, parts: HFParts, tower: Mapping[str, Any]) -> None:
    """Refuse tiles and numbers of placeholders that are not those of the vision encoder.

    Raises:
        CheckpointError: with both numbers.
    """
    size = tower["vision_cfg"]["image_size"]
    if (tile := parts.images.get("tile_size", 448)) != size:
        raise CheckpointError(
            f"{checkpoint.name!r} has tiles of {show(tile)} pixels, and its vision encoder reads {size}. Restore the "
            "published files."
        )
    named = re.search(r"_patch(\d+)_", tower["name"])
    patch = tower["args"].get("patch_size") or (int(named[1]) if named else 14)
    config: Any = parts.config
    written = read_processor(checkpoint.folder, {"patch_size": patch, "pooling_ratio": config.projector_pooling_ratio})
    given = (size // written["patch_size"] // written["pooling_ratio"]) ** 2
    if given != (tokens := (size // patch // config.projector_pooling_ratio) ** 2):
        raise CheckpointError(
            f"{checkpoint.name!r} has {tokens} vision tokens for each tile of {size} pixels, and its processor writes "
            f"{given} placeholders. Restore the published files."
        )
