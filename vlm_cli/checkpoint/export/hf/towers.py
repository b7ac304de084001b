"""A vision encoder as Transformers' own class: its configuration, and where each of its tensors comes from.

encoder of vlm                                 class of Transformers
OpenCLIP's own ViT                         ->  CLIPVisionModel
timm's ViT without a class token           ->  SiglipVisionModel (SigLIP, and SigLIP 2 of fixed resolution)
any model of timm                          ->  TimmWrapperModel, of which few classes make their own
a vision model of Transformers (hf:…)      ->  the same
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import nn

from vlm_cli.checkpoint.published.targets import Rule
from vlm_cli.checkpoint.published.towers.clip import CLIP_OPTIONAL, make_clip_rules
from vlm_cli.checkpoint.published.towers.siglip import SIGLIP_OPTIONAL, make_siglip_rules
from vlm_cli.modeling.encoders.hf import find_structure
from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.towers import build_tower

__all__ = ["STAND_IN", "HFTower", "NotHeld", "find_hf_tower", "find_timm_tower"]


@dataclass(frozen=True, kw_only=True)
class HFTower:
    """A vision encoder in Transformers' terms.

    Attributes:
        config: of its class, with `model_type`.
        image_size: the pixels of a side.
        patch_size: the pixels of a patch's side.
        make_rules: makes the rules from the names of its tensors to those of a VLM, for a pattern before the names.
        num_before: tokens before the patches.
        has_class_token: whether the first of them is a class token.
        has_norm: whether the class has a norm after its last layer.
        is_normed: whether the class's own output has passed this norm.
        is_map: whether its output is a map, and no row of patches.
        unneeded: pattern of the encoder's names that patches never pass, and that the class may lack.
    """

    config: Mapping[str, Any]
    image_size: int
    patch_size: int
    make_rules: Callable[[str], list[Rule]]
    num_before: int
    has_class_token: bool
    has_norm: bool = True
    is_normed: bool = True
    is_map: bool = False
    unneeded: str = r"(?!)"  # matches no name


class NotHeld(Exception):
    """No vision model of a class holds the vision encoder; the message says why."""


#: Takes the place of a vision encoder that no class holds, so that the other settings can be judged.
STAND_IN = HFTower(
    config={"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16},
    image_size=224,
    patch_size=16,
    make_rules=lambda prefix: [],
    num_before=0,
    has_class_token=False,
)


def find_hf_tower(vision_config: Mapping[str, Any], name: str) -> HFTower:
    """Find the vision model of Transformers that holds a vision encoder.

    Args:
        vision_config: of the VLM.
        name: of the encoder, for messages.

    Raises:
        NotHeld: if there is none.
    """
    kind = vision_config.get("type")
    if kind == "hf":
        return _keep_tower(vision_config, name)
    if kind == "several":
        raise NotHeld(f"vision_encoder is {name}: several encoders; a class of Transformers has one.")
    if kind not in (None, "timm"):
        raise NotHeld(f"vision_encoder {name!r} is of another package; Transformers has no class for it.")
    with meta_device():
        visual: Any = build_tower(vision_config)
    if hasattr(visual, "trunk"):
        return _make_siglip(visual.trunk, vision_config, name)
    return _make_clip(visual, vision_config, name)


def _keep_tower(vision_config: Mapping[str, Any], name: str) -> HFTower:
    config = dict(vision_config["config"])
    found = find_structure(vision_config)
    size = vision_config["vision_cfg"]["image_size"]
    if found.after or found.channels_last or not {"image_size", "patch_size"} <= config.keys():
        raise NotHeld(_NO_ROW.format(name=name, kind=config["model_type"]))
    side, patch = _read_square(size, config["patch_size"])
    if vision_config.get("depth") is not None:
        config["num_hidden_layers"] = vision_config["depth"]
    return HFTower(
        config=config | {"image_size": side, "patch_size": patch},
        image_size=side,
        patch_size=patch,
        make_rules=lambda prefix: [(rf"{prefix}(.*)", r"vision_encoder.visual.\1")],
        num_before=found.before,
        has_class_token=found.has_class_token,
        has_norm=found.norm is not None,
        is_normed=found.is_normed,
        is_map=found.is_map,
    )


#: Keys of OpenCLIP's `vision_cfg` that change the features and that Transformers' CLIP does not have.
_FOREIGN = (
    *("act_kwargs", "attentional_pool", "block_type", "ls_init_value", "no_ln_pre", "qk_norm", "scale_attn"),
    *("scale_attn_inner", "scale_fc", "scale_heads", "scaled_cosine_attn"),
)


def _make_clip(visual: Any, vision_config: Mapping[str, Any], name: str) -> HFTower:
    """Describe OpenCLIP's own vision transformer as a CLIP."""
    given = vision_config["vision_cfg"]
    foreign = [f"{key}={given[key]!r}" for key in _FOREIGN if given.get(key)]
    foreign += [f"norm_kwargs={x!r}" for x in [given.get("norm_kwargs")] if x and x.keys() != {"eps"}]
    if foreign or not hasattr(visual, "transformer"):
        what = ", ".join(foreign) or "a ResNet"
        raise NotHeld(f"vision_encoder {name!r} has {what}; Transformers' CLIP is a plain ViT.")
    side, patch = _read_square(visual.image_size, visual.patch_size)
    width, blocks = visual.conv1.out_channels, visual.transformer.resblocks
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "image_size": side,
        "patch_size": patch,
        "projection_dim": vision_config["embed_dim"],
        "hidden_act": "quick_gelu" if vision_config.get("quick_gelu") else "gelu",
        "layer_norm_eps": visual.ln_pre.eps,
    }
    return HFTower(
        config=config,
        image_size=side,
        patch_size=patch,
        make_rules=lambda prefix: make_clip_rules(prefix, width),
        num_before=1,
        has_class_token=True,
        is_normed=False,
        unneeded=CLIP_OPTIONAL,
    )


def _make_siglip(trunk: Any, vision_config: Mapping[str, Any], name: str) -> HFTower:
    """Describe timm's vision transformer as a SigLIP, without the pooling head, which patches never pass."""
    if problem := _siglip_problem(trunk):
        raise NotHeld(
            f"vision_encoder {name!r} is timm's {type(trunk).__name__} {problem}; the classes of Transformers' VLMs "
            "take CLIP, SigLIP, and encoders that vlm reads as hf:ORG/NAME."
        )
    block = trunk.blocks[0]
    side, patch = _read_square(trunk.patch_embed.img_size, trunk.patch_embed.patch_size)
    config = {
        "model_type": "siglip_vision_model",
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": side,
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh" if block.mlp.act.approximate == "tanh" else "gelu",
        "layer_norm_eps": block.norm1.eps,
        "vision_use_head": False,
    }
    return HFTower(
        config=config,
        image_size=side,
        patch_size=patch,
        make_rules=lambda prefix: make_siglip_rules(prefix, trunk.embed_dim),
        num_before=0,
        has_class_token=False,
        unneeded=rf"{SIGLIP_OPTIONAL}|vision_encoder\.visual\.(?:trunk\.)?(?:head|fc_norm)\..*",
    )


def _siglip_problem(trunk: Any) -> str | None:
    """Say what timm's model has beside a SigLIP's parts; None if nothing."""
    from timm.models.vision_transformer import VisionTransformer

    if type(trunk) is not VisionTransformer:
        return "model"
    if trunk.num_prefix_tokens:
        return f"with {trunk.num_prefix_tokens} tokens before the patches"
    known = re.compile(
        r"pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|attn_pool\..*"
        r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|(head|fc_norm)\..*"
    )
    more = [name for name, _ in trunk.named_parameters() if not known.fullmatch(name)]
    if more:
        return f"with {more[0]}"
    block: Any = trunk.blocks[0]
    if trunk.pos_embed is None or block.attn.qkv.bias is None:
        return "without positions or biases"
    plain = isinstance(block.mlp.act, nn.GELU) and isinstance(trunk.norm, nn.LayerNorm)
    return None if plain else f"with {type(block.mlp.act).__name__} and {type(trunk.norm).__name__}"


def find_timm_tower(vision_config: Mapping[str, Any], name: str) -> HFTower:
    """Describe a model of timm as the one that Transformers wraps.

    Args:
        vision_config: of the VLM.
        name: of the encoder, for messages.

    Raises:
        NotHeld: if it is no model of timm, or one whose output the classes do not read.
    """
    with meta_device():
        visual: Any = build_tower(vision_config) if vision_config.get("type") in (None, "timm") else None
    if not hasattr(visual, "trunk"):
        raise NotHeld(f"vision_encoder {name!r} is no model of timm; the class has one.")
    side, _ = _read_square(vision_config["vision_cfg"]["image_size"], 1)
    with torch.device("meta"), torch.no_grad():
        shape = visual.trunk.eval().forward_features(torch.empty(1, 3, side, side)).shape
    dim, count = vision_config["dim"], vision_config["num_patches"]
    is_map, before = len(shape) == 4, getattr(visual.trunk, "num_prefix_tokens", 0)
    if (is_map and shape[1] != dim) or before > 1 or isqrt(count) ** 2 != count:
        raise NotHeld(_NO_ROW.format(name=name, kind=type(visual.trunk).__name__))
    given = vision_config["vision_cfg"].get("timm_model_name")
    args = {"img_size": [side, side], "global_pool": ""} if given else dict(vision_config.get("args") or {})
    return HFTower(
        config={
            "model_type": "timm_wrapper",
            "architecture": given or vision_config["name"],
            "model_args": args,
            "hidden_size": dim,
        },
        image_size=side,
        patch_size=side // isqrt(count),
        make_rules=lambda prefix: [(rf"{prefix}timm_model\.(.*)", r"vision_encoder.visual.trunk.\1")],
        num_before=before,
        has_class_token=before == 1,
        is_map=is_map,
        unneeded=r"vision_encoder\.visual\.(?:trunk\.)?(?:head|fc_norm|attn_pool)\..*",
    )


_NO_ROW = "vision_encoder {name!r} is a {kind}, whose output is no square of patches; the classes read one."


def _read_square(size: Any, patch: Any) -> tuple[int, int]:
    """Return the sides of what an encoder reads and of its patches.

    Raises:
        NotHeld: if one of them is no square.
    """
    for what, value in (("image_size", size), ("patch_size", patch)):
        if isinstance(value, (list, tuple)) and len({*value}) != 1:
            raise NotHeld(f"the {what} of vision_encoder is {value}; it would have to be a square.")
    side, of_patch = (x[0] if isinstance(x, (list, tuple)) else x for x in (size, patch))
    return int(side), int(of_patch)
