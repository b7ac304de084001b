"""What describes a vision encoder and the pixels that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_cli.checkpoint.schemas.values import IMAGE_SIZE, PIXELS
from vlm_cli.errors import VisionEncoderError
from vlm_cli.schema import (
    ANYTHING,
    Kind,
    check,
    choice,
    either,
    list_of,
    mapping,
    mapping_of,
    number,
    optional,
    text,
    truth,
    whole,
)

__all__ = ["PREPROCESS", "PREPROCESS_OF_ANY", "VISION_CFG", "VISION_CONFIG", "check_openclip_config", "patches_problem"]

_COLOUR = either(number(-1_000, 1_000), list_of(number(-1_000, 1_000), least=1, most=4))
PREPROCESS = mapping(
    {},
    {
        "size": IMAGE_SIZE,
        "mode": text(most=8),
        "mean": list_of(number(-1_000, 1_000), least=3, most=3),
        "std": list_of(number(0, 1_000, above=True), least=3, most=3),
        "interpolation": text(most=20),
        "resize_mode": text(most=20),
        "fill_color": _COLOUR,
        "crop": choice("round", "down"),
        "shortest_edge": PIXELS,
        "least_side": PIXELS,
        "squashed": list_of(PIXELS, least=2, most=2),
    },
)
_PREPROCESS_OF_SEVERAL = mapping(
    {"size": list_of(PIXELS, least=2, most=2), "encoders": list_of(PREPROCESS, least=2, most=8)}
)
PREPROCESS_OF_ANY = Kind(
    "a mapping of keys to values",
    lambda x: isinstance(x, Mapping),
    lambda x, key: (_PREPROCESS_OF_SEVERAL if "encoders" in x else PREPROCESS).find_problems(x, key),
)
_VISION_SIZES = {
    "layers": either(whole(1, 1_000), list_of(whole(1, 1_000), least=1, most=16)),
    "width": whole(1, 1_000_000),
    "head_width": whole(1, 16_384),
    "patch_size": optional(either(whole(1, 1_024), list_of(whole(1, 1_024), least=2, most=2))),  # null: a ResNet
    "image_size": IMAGE_SIZE,
    "mlp_ratio": number(0, 64, above=True),
    "ls_init_value": optional(number(-1e6, 1e6)),
    "patch_dropout": number(0, 1),
    "attentional_pool": either(truth(), text(most=40)),
    "attn_pooler_queries": whole(1, 65_536),
    "attn_pooler_heads": whole(1, 1_024),
    "no_ln_pre": truth(),
    "final_ln_after_pool": truth(),
    "output_tokens": truth(),
    "pool_type": text(most=40),
    "timm_model_name": optional(text(most=200)),
    "timm_pool": text(most=40, empty=True),
    "timm_proj": optional(text(most=40, empty=True)),
    "timm_drop": number(0, 1),
    "timm_drop_path": optional(number(0, 1)),
    "act_kwargs": optional(mapping_of(ANYTHING)),
    "norm_kwargs": optional(mapping_of(ANYTHING)),
    "block_type": optional(text(most=40)),
}
VISION_CFG = mapping({}, _VISION_SIZES)
VISION_CONFIG = mapping(
    {
        "vision_cfg": VISION_CFG,
        "preprocess": PREPROCESS_OF_ANY,
        "num_patches": whole(1, 1_048_576),
        "dim": whole(1, 1_000_000),
    },
    {
        "embed_dim": whole(1, 1_000_000),
        "quick_gelu": truth(),
        "depth": optional(whole(1, 1_000)),
        "type": text(most=200),
        "grid": list_of(whole(1, 16_384), least=2, most=2),
        "config": mapping({"model_type": text(most=100)}),
        "name": text(most=100),
        "encoders": list_of(mapping({"vision_cfg": VISION_CFG}), least=2, most=8),
    },
)
_OPENCLIP_MODEL = mapping(
    {"embed_dim": whole(1, 1_000_000), "vision_cfg": VISION_CFG},
    {"quick_gelu": truth(), "text_cfg": mapping_of(ANYTHING), "custom_text": optional(truth())},
)


def check_openclip_config(data: Mapping[str, Any], name: str) -> None:
    """Check an OpenCLIP JSON file: a model's configuration, or `model_cfg` and `preprocess_cfg`.

    Raises:
        VisionEncoderError: naming the key.
    """
    where = f"the OpenCLIP configuration {name!r}"
    if "model_cfg" in data:
        whole_file = mapping({"model_cfg": _OPENCLIP_MODEL}, {"preprocess_cfg": PREPROCESS})
        check(data, whole_file, where, VisionEncoderError)
        model = data["model_cfg"]
    else:
        check(data, _OPENCLIP_MODEL, where, VisionEncoderError)
        model = data
    if problem := patches_problem(model["vision_cfg"]):
        raise VisionEncoderError(f"{where} is not valid: {problem}")


def patches_problem(vision_cfg: Mapping[str, Any]) -> str | None:
    """Say that an image size and a patch size give too many patches, or none; None if they fit."""
    size, patch = vision_cfg.get("image_size", 224), vision_cfg.get("patch_size") or 16
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    rows, columns = patch if isinstance(patch, (list, tuple)) else (patch, patch)
    if not 1 <= (height // rows) * (width // columns) <= 1_048_576 and "timm_model_name" not in vision_cfg:
        return (
            f"vision_cfg.image_size is {size} and vision_cfg.patch_size is {patch}, which gives "
            f"{(height // rows) * (width // columns):,} patches; an image has 1 to 1,048,576."
        )
    return None
