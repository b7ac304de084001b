"""What Cohere2 Vision, Aya Vision and InternVL have in common: a grid of tiles, and a pixel shuffle before an MLP."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_parts import MODEL, HFParts, make_language_model_rules
from vlm_cli.checkpoint.published.targets import Rule, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.schema import show

__all__ = ["GRID_SETTINGS", "check_tokens_of_a_tile", "describe_grid_model", "matches_grid_model"]
__all__ += ["read_layer", "read_limits"]

#: Settings of the image processor that say how a picture is cut.
GRID_SETTINGS: Collection[str] = {"crop_to_patches", "min_patches", "max_patches"}

#: What stands behind the last norm of a vision encoder.
_HEADS = r"vision_encoder\.visual\.(?:head|pooler)\..*"
_PROJECTOR: list[Rule] = [
    (rf"{MODEL}multi_modal_projector\.layer_?norm\.(\w+)", r"vision_tokenizer.norm.\1"),
    (rf"{MODEL}multi_modal_projector\.linear_1\.(\w+)", r"vision_tokenizer.proj.0.\1"),
    (rf"{MODEL}multi_modal_projector\.linear_2\.(\w+)", r"vision_tokenizer.proj.2.\1"),
]


def matches_grid_model(checkpoint: PublishedCheckpoint, model_type: str) -> bool:
    """Look for the projector's first matrix and the configuration's type."""
    return checkpoint.config.get("model_type") == model_type and any(
        name.endswith("multi_modal_projector.linear_1.weight") for name in checkpoint.tensors
    )


def read_layer(name: str, config: Any) -> int:
    """Return the layer whose features are projected, counted from the end. Transformers counts from the embeddings too.

    Raises:
        CheckpointError: for several layers.
    """
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise CheckpointError(f"{name!r} takes features of layers {show(layer)}; vlm takes those of a single layer.")
    return layer if layer < 0 else layer - config.vision_config.num_hidden_layers - 1


def read_limits(images: Mapping[str, Any]) -> dict[str, int]:
    """Read the least and the most number of tiles from the settings of `GotOcr2ImageProcessor`."""
    return {"min_tiles": images.get("min_patches", 1), "max_tiles": images.get("max_patches", 12)}


def check_tokens_of_a_tile(checkpoint: PublishedCheckpoint, parts: HFParts, factor: int, written: int) -> None:
    """Refuse a processor that writes another number of placeholders for a tile than the model has vision tokens.

    Args:
        checkpoint: named in the error.
        parts: with the vision encoder's sizes.
        factor: of the pixel shuffle.
        written: placeholders of one tile.

    Raises:
        CheckpointError: with both numbers.
    """
    size, patch = parts.vision_config["vision_cfg"]["image_size"], parts.vision_config["config"]["patch_size"]
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    if (tokens := (size // patch // factor) ** 2) != written:
        raise CheckpointError(
            f"{checkpoint.name!r} has {tokens} vision tokens for each tile of {size} pixels, and its processor writes "
            f"{written} placeholders. Restore the published files."
        )


def describe_grid_model(
    checkpoint: PublishedCheckpoint,
    parts: HFParts,
    *,
    vision_encoder: Mapping[str, Any],
    vision_tokenizer: Mapping[str, Any],
    tiling: Mapping[str, Any],
    notes: tuple[str, ...] = (),
) -> CheckpointDescription:
    """Describe a checkpoint of these parts, whose placeholder for a vision token is no `<image>`.

    `<image>` is added to the tokenizer, after its last token. Nothing reads the row of `<image>` in the tables.

    Args:
        checkpoint: holds all parts.
        parts: its configurations.
        vision_encoder: settings of the composition's vision encoder that choose its features.
        vision_tokenizer: settings of the composition's mlp.
        tiling: settings of the composition's grid, its texts among them.
        notes: sentences that the user should read.
    """
    optional = parts.optional if vision_encoder.get("norm") is False else _HEADS
    return CheckpointDescription(
        composition={
            "family": "llava",
            "vision_encoder": {"name": f"hf:{checkpoint.name}", **vision_encoder},
            "vision_tokenizer": {"type": "mlp", **vision_tokenizer},
            "fusion": "language-stream",
            "tiling": {"type": "grid", **tiling},
            "language_model": {"name": checkpoint.name},
            "added_tokens": [MEDIA_TOKEN],
            "trainable": ["vision_tokenizer", "language_model"],
        },
        targets_for=lambda ours: make_targets_of(
            [*_PROJECTOR, *parts.rules, *make_language_model_rules(checkpoint, ours, has_added_rows=False)]
        ),
        text_config=parts.text_config,
        vision_config=parts.vision_config,
        optional_pattern=rf"{optional}|added_tokens\..*",
        notes=notes,
    )
