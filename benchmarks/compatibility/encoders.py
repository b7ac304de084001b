"""Every vision model of Transformers, and one model of each family of timm, as vision encoders.

A model of Transformers is built with the default settings of its type and two layers, where it is a single stack; its
tokens are checked as those of published weights are, and its features must be finite, the same for an image alone and
among others, and others for another image. A model of timm is measured on the meta device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models._registry import _module_to_models
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_MAPPING_NAMES

from vlm_cli.checkpoint.parts.plain_types import PLAIN_TYPES
from vlm_cli.checkpoint.parts.unsuitable_encoders import explain_unsuitable
from vlm_cli.checkpoint.parts.vision_encoders import find_tower
from vlm_cli.checkpoint.parts.vision_halves import take_vision_half
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import explain_reading
from vlm_cli.modeling.encoders.hf import check_tokens, find_structure
from vlm_cli.modeling.towers import build_tower, find_grid, find_tower_shape, patch_features
from vlm_cli.trust import find_vision_class, list_arguments, list_model_classes

__all__ = ["MOST_PATCHES", "EncoderRow", "check_family", "check_vision_type", "find_class_name"]
__all__ += ["timm_families", "vision_types"]

#: Types whose features vanish with random weights.
_VANISHING = ("efficientnet", "mobilevitv2")
MOST_PATCHES = 1_100  # of a model that is run; of others only shapes are measured


@dataclass(frozen=True)
class EncoderRow:
    """What was measured of one encoder.

    Attributes:
        name: the type, or the family of timm.
        model: class of Transformers, or name of timm.
        shape: patches and channels; None if it cannot be an encoder.
        beside: class and register tokens.
        layers: how many layers can be chosen; 0 if they cannot be told apart.
        problem: why it cannot be an encoder; empty if it can.
    """

    name: str
    model: str
    shape: tuple[int, int] | None = None
    beside: int = 0
    layers: int = 0
    problem: str = ""


def vision_types() -> list[str]:
    """List the types of Transformers whose models take images and no text.

    Those of a configuration that holds others are left out: its halves have types of their own.
    """
    return sorted(kind for kind in CONFIG_MAPPING if _takes_images(kind))


def _takes_images(kind: str) -> bool:
    if (config := _make(kind)) is None or any(hasattr(config, half) for half in ("text_config", "vision_config")):
        return False
    says_so = kind in MODEL_FOR_IMAGE_MAPPING_NAMES or "vision" in kind
    if not (says_so or any(hasattr(config, key) for key in ("image_size", "patch_size", "num_channels"))):
        return False
    classes = list_model_classes(config)
    first = list_arguments(classes[0])[0][0] if classes else ""
    return kind in PLAIN_TYPES or (bool(classes) and not first.startswith("input"))


def _make(kind: str) -> Any:
    """Return the default configuration of a type; None if it has none."""
    try:
        return CONFIG_MAPPING[kind]()
    except Exception:
        return None


def find_class_name(kind: str) -> str:
    """Return the name of Transformers' class for a type, or of that under whose name vlm builds it."""
    cls = find_vision_class(take_vision_half(kind, CONFIG_MAPPING[kind]()))
    assert cls is not None
    return cls.__name__


def check_vision_type(kind: str) -> EncoderRow:
    """Measure a type of Transformers with its default settings."""
    config: Any = CONFIG_MAPPING[kind]()
    if reason := explain_unsuitable(config):
        return EncoderRow(kind, "", problem=reason)
    config = take_vision_half(kind, config)
    model = find_class_name(kind)
    size = getattr(config, "image_size", None) or 224
    vision = {"type": "hf", "config": config.to_dict(), "vision_cfg": {"image_size": size}}
    small = vision | {"vision_cfg": {"image_size": 224}}
    try:
        found = find_structure(vision)
        if found.is_map and _can_read(small):  # a large image takes minutes
            vision, found = small, find_structure(small)
        shape = find_tower_shape(vision)
        if shape[0] <= MOST_PATCHES and kind not in _VANISHING:
            _check_numbers(vision, shape)
    except AssertionError as error:
        return EncoderRow(kind, model, problem=str(error))
    except Exception as error:
        return EncoderRow(kind, model, problem=explain_reading(error))
    return EncoderRow(kind, model, shape, found.before + found.after, found.depth if found.layers else 0)


def _can_read(vision: dict[str, Any]) -> bool:
    try:
        return find_structure(vision).is_map
    except Exception:
        return False


@torch.inference_mode()
def _check_numbers(vision: dict[str, Any], shape: tuple[int, int]) -> None:
    """Run a small model of the type.

    Raises:
        AssertionError: naming what does not hold.
    """
    torch.manual_seed(0)
    small = dict(vision["config"])
    if find_structure(vision).is_single_stack and "num_hidden_layers" in small:
        small = {k: x for k, x in small.items() if k not in ("out_features", "out_indices", "stage_names")}
        small["num_hidden_layers"] = 2
    encoder: Any = build_tower(vision | {"config": small}).eval()
    check_tokens(encoder, small["model_type"])
    pixels = torch.randn(2, 3, *encoder.pixel_size)
    together = patch_features(encoder, pixels)
    alone = torch.cat([patch_features(encoder, x[None]) for x in pixels])
    assert together.shape[1:] == shape, f"it declares {shape} and gives {tuple(together.shape[1:])}"
    assert together.isfinite().all(), "its features are not finite"
    assert (together - alone).abs().max() <= 1e-4 * alone.abs().max(), "an image depends on the others"
    assert not torch.equal(alone[0], alone[1]), "all images have the same features"


def timm_families() -> dict[str, str]:
    """Return a small model of each family (a module) of timm."""
    return {family: min(names, key=_size) for family, names in sorted(_module_to_models.items())}


def _size(name: str) -> tuple[bool, bool, str]:
    is_small = re.search(r"atto|femto|pico|nano|tiny|_ti_|xxs|_xs|small|_s$|_s_|b0|m0|_18|18$|test_", name)
    return not timm.is_model_pretrained(name), is_small is None, name


def check_family(family: str) -> EncoderRow:
    """Measure the model that stands for a family of timm."""
    name = timm_families()[family]
    try:
        tower = find_tower(VisionEncoderOptions(name=f"timm:{name}"))
        shape = find_tower_shape(tower.config)
        if find_grid(tower.config, shape[0]) is None:
            return EncoderRow(family, name, problem=f"its {shape[0]} tokens form no grid")
    except Exception as error:
        return EncoderRow(family, name, problem=explain_reading(error))
    return EncoderRow(family, name, shape)
