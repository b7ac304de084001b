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

from vlm_cli.checkpoint.parts.vision_encoders import find_tower
from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import explain_reading
from vlm_cli.modeling.encoders.hf import check_tokens, find_structure
from vlm_cli.modeling.towers import build_tower, find_grid, find_tower_shape, patch_features
from vlm_cli.trust import find_vision_class

__all__ = ["CANNOT", "MOST_PATCHES", "EncoderRow", "check_family", "check_vision_type", "find_class_name"]
__all__ += ["timm_families", "vision_types"]

_DETECTOR = "it detects objects, and its output is one token per object"
_OWN_GRID = "it reads patches of images of any size, and takes their grid as another argument"
_CLIPS = "it reads clips, and no single image"
_OTHER_INPUT = "it takes features of another part, and no image"

#: Type -> why it cannot be a vision encoder.
CANNOT: dict[str, str] = {
    **dict.fromkeys(("conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer"), _DETECTOR),
    **dict.fromkeys(
        (
            *("cosmos3_edge_vision", "dots3_note_vision_encoder", "glm_image_vision", "hunyuan_vl_vision"),
            *("hy_v4_vl_vision", "inkling2_vision", "minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision"),
            *("minimax_m3_vl_vision", "molmo2_vision", "muse_glimmer_vision", "muse_spark_vision"),
            *("paddleocr_vl_vision", "phi4_multimodal_vision", "siglip2_vision_model", "video_llama_3_vision"),
        ),
        _OWN_GRID,
    ),
    **dict.fromkeys(("timesformer", "videomae", "vivit", "xclip_vision_model"), _CLIPS),
    **dict.fromkeys(
        ("florence_vision", "lw_detr_vit", "rf_detr_dinov2", "vitpose_backbone", "vision-encoder-decoder"), _OTHER_INPUT
    ),
    "seggpt": "it compares two images",
    **dict.fromkeys(("groupvit_vision_model", "mgp-str"), "it gathers patches into groups, which form no grid"),
    **dict.fromkeys(("sam3_video",), "it follows objects through a clip"),
    **dict.fromkeys(("apertus1p5_vision_tokenizer",), "it turns images into codes"),
    **dict.fromkeys(("timm_wrapper", "timm_backbone"), "it wraps a model of timm; write timm:NAME"),
    "vit_mae": "it hides three quarters of the patches at random; the same weights load as a ViT",
    "dinat": "it needs the package natten",
    "dinov3_convnext": "it puts the mean of the patches before them; write timm:convnext_tiny.dinov3_lvd1689m",
    "depth_pro": "it cuts an image into patches of three sizes itself",
    "edgetam_vision_model": "its default settings name no model of timm",
    "mllama_vision_model": "it reads the tiles of a picture together; vlm imports it with the model around it",
    "levit": "its stages have grids that are rounded up, and its tokens do not say so; write timm:levit_128",
}


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
    """List the types of Transformers that have a class for models that read images alone."""
    found = []
    for kind in CONFIG_MAPPING:
        try:
            config: Any = CONFIG_MAPPING[kind]()
        except Exception:  # a type without defaults cannot be measured, and no model of it is small
            continue
        if any(hasattr(config, half) for half in ("text_config", "vision_config")):
            continue  # its halves have types of their own
        if (kind in MODEL_FOR_IMAGE_MAPPING_NAMES or "vision" in kind or _has_image(config)) and _has_class(config):
            found.append(kind)
    return sorted(found)


def _has_image(config: Any) -> bool:
    return any(hasattr(config, key) for key in ("image_size", "patch_size", "num_channels"))


def _has_class(config: Any) -> bool:
    try:
        return find_vision_class(config) is not None
    except Exception:
        return False


def find_class_name(kind: str) -> str:
    """Return the name of Transformers' class for a type."""
    config: Any = CONFIG_MAPPING[kind]()
    cls = find_vision_class(config)
    return "" if cls is None else cls.__name__


def check_vision_type(kind: str) -> EncoderRow:
    """Measure a type of Transformers with its default settings."""
    config: Any = CONFIG_MAPPING[kind]()
    model = find_class_name(kind)
    if kind in CANNOT:
        return EncoderRow(kind, model, problem=CANNOT[kind])
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
