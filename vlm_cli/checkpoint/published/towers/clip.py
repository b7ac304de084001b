"""CLIP's vision transformer (https://arxiv.org/abs/2103.00020) as Transformers writes it, in OpenCLIP's terms.

Source: transformers/models/clip/modeling_clip.py, and open_clip/transformer.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.preprocessing import read_preprocessing
from vlm_cli.checkpoint.published.settings import Settings
from vlm_cli.checkpoint.published.shapes import count_layers, find_shape
from vlm_cli.checkpoint.published.targets import Rule, Target, stack_rows
from vlm_cli.errors import CheckpointError

__all__ = [
    "CLIP_OPTIONAL",
    "CLIP_SETTINGS",
    "CLIP_TOWERS",
    "convert_clip_config",
    "make_clip_rules",
    "name_clip_tower",
    "read_clip_shapes",
]

#: Hub id of a CLIP, as Transformers loads it -> OpenCLIP's name and tag of its vision encoder.
CLIP_TOWERS = {
    "openai/clip-vit-large-patch14-336": ("ViT-L-14-336", "openai"),
    "openai/clip-vit-large-patch14": ("ViT-L-14", "openai"),
    "openai/clip-vit-base-patch16": ("ViT-B-16", "openai"),
    "openai/clip-vit-base-patch32": ("ViT-B-32", "openai"),
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": ("ViT-L-14", "laion2b_s32b_b82k"),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("ViT-H-14", "laion2b_s32b_b79k"),
}

#: Names of OpenCLIP's tower after its last layer, which a VLM that reads patches does not need.
CLIP_OPTIONAL = r"vision_encoder\.visual\.proj"

_OURS = "vision_encoder.visual."

#: What becomes of the settings in a `vision_config`.
CLIP_SETTINGS = Settings(
    config=CLIPVisionConfig,
    read={
        *("hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
        *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
    },
    without_effect={"attention_dropout", "initializer_range", "initializer_factor"},
    fixed={"num_channels": (3,)},
)


def make_clip_rules(prefix: str, width: int) -> list[Rule]:
    """Make the rules for the names of a vision transformer.

    Args:
        prefix: pattern before `embeddings.`, `encoder.` and so on.
        width: channels. OpenCLIP stacks the matrices of queries, keys and values, of `width` rows each.
    """
    block = rf"{_OURS}transformer.resblocks.\1."

    def stack(match: re.Match[str]) -> list[Target]:
        number, which, kind = match.groups()
        return stack_rows(f"{_OURS}transformer.resblocks.{number}.attn.in_proj_{kind}", "qkv", which, width)

    layer = rf"{prefix}encoder\.layers\.(\d+)\."
    return [
        (rf"{prefix}embeddings\.class_embedding", f"{_OURS}class_embedding"),
        (rf"{prefix}embeddings\.patch_embedding\.weight", f"{_OURS}conv1.weight"),
        (rf"{prefix}embeddings\.position_embedding\.weight", f"{_OURS}positional_embedding"),
        (rf"{prefix}embeddings\.position_ids", None),
        # Transformers misspells the name.
        (rf"{prefix}pre_?layrnorm\.(\w+)", rf"{_OURS}ln_pre.\1"),
        (rf"{prefix}post_layernorm\.(\w+)", rf"{_OURS}ln_post.\1"),
        (rf"{layer}self_attn\.([qkv])_proj\.(weight|bias)", stack),
        (rf"{layer}self_attn\.out_proj\.(\w+)", rf"{block}attn.out_proj.\2"),
        (rf"{layer}layer_norm([12])\.(\w+)", rf"{block}ln_\2.\3"),
        (rf"{layer}mlp\.fc1\.(\w+)", rf"{block}mlp.c_fc.\2"),
        (rf"{layer}mlp\.fc2\.(\w+)", rf"{block}mlp.c_proj.\2"),
    ]


def read_clip_shapes(checkpoint: PublishedCheckpoint, prefix: str, hub_id: str | None) -> dict[str, Any] | None:
    """Read Transformers' CLIP vision configuration from shapes; None if the checkpoint has no such tower.

    Args:
        checkpoint: its names and shapes are read.
        prefix: pattern before `embeddings.`, `encoder.` and so on.
        hub_id: the CLIP that the tower was taken from, if the checkpoint names it. LAION's have the exact GELU, all
            others OpenAI's `quick_gelu`; shapes do not tell.

    Raises:
        CheckpointError: if the checkpoint has only some of the tower's tensors.
    """
    patch = find_shape(checkpoint, rf"{prefix}embeddings\.patch_embedding\.weight")
    positions = find_shape(checkpoint, rf"{prefix}embeddings\.position_embedding\.weight")
    hidden = find_shape(checkpoint, rf"{prefix}encoder\.layers\.0\.mlp\.fc1\.weight")
    if patch is None:
        return None
    if positions is None or hidden is None:
        raise CheckpointError(f"{checkpoint.name!r} has only part of a vision encoder. Is it complete?")
    width, patch_size = patch[0], patch[-1]
    return {
        "hidden_size": width,
        "intermediate_size": hidden[0],
        "num_hidden_layers": count_layers(checkpoint, rf"{prefix}encoder\.layers\.(\d+)\."),
        # Every CLIP has heads of 64 channels, except LAION's ViT-H, which has 16 heads of 80.
        "num_attention_heads": 16 if width == 1280 else max(1, width // 64),
        "image_size": isqrt(positions[0] - 1) * patch_size,  # pixels; the class token has a position too
        "patch_size": patch_size,
        "hidden_act": "gelu" if str(hub_id).startswith("laion") else "quick_gelu",
    }


def name_clip_tower(config: Mapping[str, Any]) -> str:
    """Return OpenCLIP's name of the tower with these sizes, or a general word.

    Args:
        config: Transformers' CLIP vision configuration.
    """
    sizes = (config["hidden_size"], config["num_hidden_layers"], config["patch_size"], config["image_size"])
    return _NAMES.get(sizes, "clip-vision-transformer")


#: (channels, layers, pixels of a patch's side, pixels of an image's side) -> OpenCLIP's name.
_NAMES = {(1024, 24, 14, 336): "ViT-L-14-336", (1024, 24, 14, 224): "ViT-L-14", (1280, 32, 14, 224): "ViT-H-14"}


def convert_clip_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Turn Transformers' CLIP vision configuration into OpenCLIP's.

    Args:
        config: `hidden_size`, `num_hidden_layers`, and so on.
        folder: where `preprocessor_config.json` may be.

    Raises:
        CheckpointError: for an activation that OpenCLIP's tower does not have.
    """
    width, heads = config["hidden_size"], config["num_attention_heads"]
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise CheckpointError(
            f"the vision encoder has activation {activation!r}; OpenCLIP's towers have gelu or quick_gelu."
        )
    vision_cfg = {
        "image_size": config["image_size"],
        "layers": config["num_hidden_layers"],
        "width": width,
        "head_width": width // heads,
        "patch_size": config["patch_size"],
        "mlp_ratio": config["intermediate_size"] / width,
    }
    if (epsilon := config.get("layer_norm_eps", 1e-5)) != 1e-5:  # OpenCLIP's own
        vision_cfg["norm_kwargs"] = {"eps": epsilon}
    return {
        "embed_dim": config.get("projection_dim") or width,
        "vision_cfg": vision_cfg,
        "quick_gelu": activation == "quick_gelu",
        "preprocess": read_preprocessing(folder, config["image_size"]),
    }
