"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744), as Transformers writes it.

Source: transformers/models/llava, `LlavaForConditionalGeneration`, with the names of releases before and after 4.52.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_parts import NO_SETTINGS, OPTIONAL_IN_TOWERS, make_language_model_rules
from vlm_cli.checkpoint.published.preprocessing import PADS_TO_SQUARES, pads_to_squares, read_preprocessing
from vlm_cli.checkpoint.published.settings import Settings, check_settings_of
from vlm_cli.checkpoint.published.shapes import find_shape
from vlm_cli.checkpoint.published.targets import Rule, Target, make_targets_of
from vlm_cli.checkpoint.published.towers.clip import (
    CLIP_OPTIONAL,
    CLIP_SETTINGS,
    convert_clip_config,
    make_clip_rules,
    name_clip_tower,
)
from vlm_cli.checkpoint.published.towers.siglip import SIGLIP_PIXELS
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.encoders.hf import find_structure
from vlm_cli.schema import show
from vlm_cli.trust import find_vision_class, make_config

__all__ = ["OPTIONAL", "HuggingFaceLLaVA"]

_MODEL = r"(?:model\.)?"
#: LLaVA takes features before the vision encoder's last norm, so it does not need that norm.
OPTIONAL = rf"{CLIP_OPTIONAL}|vision_encoder\.visual\.ln_post\.\w+"


class HuggingFaceLLaVA:
    """`vision_tower`, `multi_modal_projector` and `language_model`, with a `config.json` of type `llava`."""

    name = "LLaVA (Hugging Face)"
    source = "transformers/models/llava/modeling_llava.py"
    model_type = "llava"
    #: The module that reads pictures.
    tower = "vision_tower"
    #: Sentences that the user should read.
    notes: tuple[str, ...] = ()
    settings = Settings(
        config=LlavaConfig,
        read={
            *("vision_config", "text_config", "image_token_index", "image_token_id", "vision_feature_select_strategy"),
            *("vision_feature_layer", "multimodal_projector_bias"),
        },
        without_effect={"image_seq_length", "tie_word_embeddings", "ignore_index", "pad_token_id"},
        fixed={"projector_hidden_act": ("gelu", "linear")},
    )

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projector's first matrix and the configuration's type."""
        return checkpoint.config.get("model_type") == self.model_type and any(
            name.endswith("multi_modal_projector.linear_1.weight") for name in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts, and its tokenizer has `<image>`."""
        config = checkpoint.config
        check_settings_of(checkpoint.name, "", config, self.settings)
        vision, text = dict(config["vision_config"]), dict(config["text_config"])
        text.setdefault("model_type", "llama")
        vision.setdefault("model_type", "clip_vision_model")
        tower = _read_tower(checkpoint, vision, rf"{_MODEL}{self.tower}\.(?:vision_model\.)?")
        media_id = config.get("image_token_index", config.get("image_token_id", 32000))
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {
                    "name": tower.name,
                    "layer": _count_from_end(checkpoint.name, self.read_layers(config), tower.depth),
                    **({"norm": False} if tower.has_norm else {}),
                    "class_token": _takes_class_token(checkpoint, tower),
                },
                "vision_tokenizer": self.read_projector(config),
                "fusion": "language-stream",
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "language_model"],
            },
            targets_for=lambda ours: make_targets_of(
                [*tower.rules, *_projector_rules(checkpoint), *make_language_model_rules(checkpoint, ours)]
            ),
            text_config=text,
            vision_config=tower.config,
            first_added_id=media_id,
            optional_pattern=tower.optional,
            notes=(*self.notes, *((PADS_TO_SQUARES,) if pads_to_squares(checkpoint.folder) else ())),
        )

    def read_layers(self, config: Mapping[str, Any]) -> int | list[int]:
        """Return the layers whose features are projected, as Transformers counts them."""
        layers: int | list[int] = config.get("vision_feature_layer", -2)
        return layers

    def read_projector(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read the settings of the vision tokenizer."""
        is_single = config.get("projector_hidden_act") == "linear"
        return {"type": "linear" if is_single else "mlp", "bias": config.get("multimodal_projector_bias", True)}


def _count_from_end(name: str, layers: int | list[int], depth: int) -> int | list[int]:
    """Count layers from the end. Transformers counts from the end (-1, -2, …) or from the embeddings (0, 1, …).

    Raises:
        CheckpointError: for the embeddings, or a layer that the vision encoder does not have.
    """
    found = [layer if layer < 0 else layer - depth - 1 for layer in ([layers] if isinstance(layers, int) else layers)]
    if not all(-depth <= layer < 0 for layer in found):
        raise CheckpointError(
            f"{name!r} takes features of layers {show(layers)}; its vision encoder has layers 1 to {depth}, or "
            f"-{depth} to -1."
        )
    return found[0] if isinstance(layers, int) else found


@dataclass(frozen=True, kw_only=True)
class _Tower:
    """The vision encoder of a checkpoint.

    Attributes:
        name: of the composition's vision encoder.
        config: of the VLM's vision encoder.
        rules: for its tensors.
        optional: pattern of names that the vision encoder has and LLaVA does not need.
        depth: number of layers.
        num_before: tokens before the patches.
        has_class_token: whether the first of them is a class token.
        has_norm: whether a norm follows the last layer.
    """

    name: str
    config: dict[str, Any]
    rules: list[Rule]
    optional: str
    depth: int
    num_before: int
    has_class_token: bool
    has_norm: bool = True


def _read_tower(checkpoint: PublishedCheckpoint, vision: Mapping[str, Any], prefix: str) -> _Tower:
    """Describe a CLIP as OpenCLIP's tower, and any other vision model as Transformers' own.

    Raises:
        CheckpointError: for a setting that vlm cannot carry over, or a model that is no vision transformer.
    """
    if vision["model_type"] == "clip_vision_model":
        check_settings_of(checkpoint.name, "vision_config", vision, CLIP_SETTINGS)
        # Files of early releases lack what is the default of Transformers.
        whole = {**CLIPVisionConfig().to_dict(), **vision}
        return _Tower(
            name=name_clip_tower(whole),
            config=convert_clip_config(whole, checkpoint.folder),
            rules=make_clip_rules(prefix, whole["hidden_size"]),
            optional=OPTIONAL,
            depth=whole["num_hidden_layers"],
            num_before=1,
            has_class_token=True,
        )
    found = dict(vision)
    config = make_config(found.pop("model_type"), **found)
    settings, size = config.to_dict(), getattr(config, "image_size", None)
    if isinstance(size, (list, tuple)) and len({*size}) == 1:
        size = size[0]
    if find_vision_class(config) is None or not isinstance(size, int):
        raise CheckpointError(
            f"{checkpoint.name!r} has a vision encoder of type {vision['model_type']!r}; vlm reads CLIP, SigLIP and "
            "other vision transformers of Transformers."
        )
    preprocess = read_preprocessing(checkpoint.folder, size, resize_mode="squash", like=SIGLIP_PIXELS)
    whole = {
        "type": "hf",
        "config": {key: x for key, x in settings.items() if key not in NO_SETTINGS},
        "vision_cfg": {"image_size": size},
        "preprocess": preprocess,
    }
    structure = find_structure(whole)
    return _Tower(
        name=f"hf:{checkpoint.name}",
        config=whole,
        rules=[(rf"{prefix}(.*)", r"vision_encoder.visual.\1")],
        optional=OPTIONAL_IN_TOWERS,
        depth=structure.depth,
        num_before=structure.before,
        has_class_token=structure.has_class_token,
        has_norm=structure.norm is not None,
    )


def _takes_class_token(checkpoint: PublishedCheckpoint, tower: _Tower) -> bool:
    """Say whether the class token is projected, too.

    Raises:
        CheckpointError: for tokens that vlm does not take.
    """
    strategy = checkpoint.config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(
            f"{checkpoint.name!r} takes features by strategy {show(strategy)}; vlm takes them with or without "
            "their class token."
        )
    if strategy == "default" and not tower.num_before:
        raise CheckpointError(
            f"{checkpoint.name!r} has vision_feature_select_strategy='default', which drops the first patch of a "
            "SigLIP, as if it were a class token; vlm takes all patches."
        )
    if tower.num_before > 1 or (tower.num_before and not tower.has_class_token):
        raise CheckpointError(
            f"{checkpoint.name!r} projects {tower.num_before} tokens before the patches; vlm takes patches with or "
            "without a class token."
        )
    return strategy == "full" and tower.has_class_token


def _projector_rules(checkpoint: PublishedCheckpoint) -> list[Rule]:
    """Make the rules for the two maps and the norm. Without an activation, the second map changes nothing."""
    projector = rf"{_MODEL}multi_modal_projector\."
    norm: Rule = (rf"{projector}projector_layernorm\.(\w+)", r"vision_tokenizer.norm.\1")
    if checkpoint.config.get("projector_hidden_act") != "linear":
        return [
            (rf"{projector}linear_1\.(\w+)", r"vision_tokenizer.proj.0.\1"),
            (rf"{projector}linear_2\.(\w+)", r"vision_tokenizer.proj.2.\1"),
            norm,
        ]
    shape = find_shape(checkpoint, rf"{projector}linear_1\.weight")
    assert shape is not None
    return [
        (rf"{projector}linear_1\.(\w+)", r"vision_tokenizer.proj.\1"),
        (rf"{projector}linear_2\.(\w+)", lambda match: [_changes_nothing(match[1], shape)]),
        norm,
    ]


def _changes_nothing(kind: str, shape: tuple[int, ...]) -> Target:
    """Read the second of two maps without an activation between them, of which vlm keeps the first.

    Args:
        kind: `weight` or `bias`.
        shape: of the first map's matrix.
    """
    dim_out, dim_in = shape

    def nothing() -> Tensor:
        return torch.eye(dim_out) if kind == "weight" else torch.zeros(dim_out)

    def check(x: Tensor) -> Tensor:
        if not x.is_meta and not torch.equal(x, nothing().to(x)):
            raise CheckpointError(
                f"multi_modal_projector.linear_2.{kind} changes what the first map gives, and no activation stands "
                "between the two; vlm has a single map (linear), or two with an activation (mlp)."
            )
        return x.new_empty(0, dim_in)

    return Target(
        "vision_tokenizer.proj.weight",
        target_rows=slice(0),
        transform=check,
        restore=lambda x: nothing().to(x),
    )
