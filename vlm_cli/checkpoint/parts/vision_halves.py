"""The vision half of a model that also reads text: where its configuration is, and why some cannot be taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vlm_cli.checkpoint.parts.unsuitable_encoders import UNREADABLE_HALVES, explain_unsuitable
from vlm_cli.errors import VisionEncoderError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vlm_cli.checkpoint.parts.plain_types import PlainType

__all__ = ["find_plain_type", "take_vision_half"]

#: Settings of a larger model that hold the configuration of its vision half. Of two such models, the first counts.
_HALVES = (
    "vision_config",
    "image_config",
    "vision_encoder_config",
    "vision_tower_config",
    "encoder",
    "backbone_config",
)
#: Settings that add a head, which patches never pass.
_HEADS = ("vision_use_head", "use_head")


def take_vision_half(name: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the vision model in a configuration, under its plain name.

    Raises:
        VisionEncoderError: if there is none, or vlm cannot read its features; it says why.
    """
    from vlm_cli.trust import find_vision_class, make_config

    found = _find_half(config)
    if (plain := find_plain_type(config)) is not None:
        settings = plain.convert_settings({key: getattr(found, key, None) for key in plain.settings})
        found = make_config(**settings)
    if reason := explain_unsuitable(found) or UNREADABLE_HALVES.get(config.model_type):
        half = "" if found is config else f". Its vision half, of type {found.model_type!r},"
        raise VisionEncoderError(
            f"{name!r} is of type {config.model_type!r}{half or ', which'} cannot be a vision encoder: {reason}. `vlm "
            "list vision-encoders hf` lists the types that can."
        )
    if find_vision_class(found) is None:
        raise VisionEncoderError(
            f"{name!r} holds a model of type {config.model_type!r}, in which Transformers has no vision model. Give "
            "one that reads images: `vlm list vision-encoders hf` lists the types."
        )
    for key in _HEADS:
        if hasattr(found, key) or (key == "vision_use_head" and found.model_type == "siglip_vision_model"):
            setattr(found, key, False)
    return found


def find_plain_type(config: PreTrainedConfig) -> PlainType | None:
    """Return what the vision half of a configuration is under its plain name; None if it has its own name already."""
    from vlm_cli.checkpoint.parts.plain_types import PLAIN_TYPES

    return PLAIN_TYPES.get(_find_half(config).model_type)


def _find_half(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the innermost configuration that settings for vision halves lead to; the configuration itself if none.

    A configuration without such settings may hold another whole model, as π0's holds PaliGemma's.
    """
    halves: list[Any] = [x for key in _HALVES if _is_config(x := getattr(config, key, None))]
    if not halves:
        halves = [x for x in _nested(config) if any(_is_config(getattr(x, key, None)) for key in _HALVES)]
    return _find_half(halves[0]) if halves else config


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield from (x for x in vars(config).values() if _is_config(x))


def _is_config(value: Any) -> bool:
    return hasattr(value, "model_type")
