"""EVA's vision transformer (https://arxiv.org/abs/2211.07636) as Transformers writes it for BLIP-2, in timm's terms.

Source: transformers/models/blip_2/modeling_blip_2.py, `Blip2VisionModel`, and timm/models/eva.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.preprocessing import read_preprocessing
from vlm_cli.checkpoint.published.shapes import count_layers
from vlm_cli.checkpoint.published.targets import Rule, Target
from vlm_cli.errors import CheckpointError

__all__ = ["EVA_OPTIONAL", "EVA_TOWERS", "EvaTower", "make_eva_rules", "read_eva_tower"]

#: Names of OpenCLIP's tower after its last norm, which a VLM that reads patches does not need.
EVA_OPTIONAL = r"vision_encoder\.visual\.trunk\.head\.\w+"

_OURS = "vision_encoder.visual.trunk."


@dataclass(frozen=True, kw_only=True)
class EvaTower:
    """One of EVA's towers in OpenCLIP."""

    openclip: str  # OpenCLIP's name
    timm: str  # timm's name, by which OpenCLIP builds it
    embed_dim: int  # channels of OpenCLIP's projection
    num_heads: int
    image_size: int  # pixels


#: (channels, hidden channels of the feed-forward, pixels of a patch's side) -> the tower with these sizes.
EVA_TOWERS = {
    (1408, 6144, 14): EvaTower(
        openclip="EVA01-g-14", timm="eva_giant_patch14_224", embed_dim=1024, num_heads=16, image_size=224
    )
}


def make_eva_rules(prefix: str, width: int) -> list[Rule]:
    """Make the rules for the names of a tower.

    Args:
        prefix: pattern before `embeddings.`, `encoder.` and so on.
        width: channels.
    """

    def drop_key_bias(match: re.Match[str]) -> list[Target]:
        """Leave out the keys' bias, which timm lacks: it adds the same to all scores of a query, and a softmax does
        not see that."""
        block = f"{_OURS}blocks.{match[1]}.attn."
        return [
            Target(f"{block}q_bias", source_rows=slice(width)),
            Target(f"{block}v_bias", source_rows=slice(2 * width, None)),
        ]

    block, layer = rf"{_OURS}blocks.\1.", rf"{prefix}encoder\.layers\.(\d+)\."
    return [
        (rf"{prefix}embeddings\.class_embedding", f"{_OURS}cls_token"),
        (rf"{prefix}embeddings\.position_embedding", f"{_OURS}pos_embed"),
        (rf"{prefix}embeddings\.patch_embedding\.(\w+)", rf"{_OURS}patch_embed.proj.\1"),
        (rf"{layer}layer_norm([12])\.(\w+)", rf"{block}norm\2.\3"),
        (rf"{layer}self_attn\.qkv\.weight", rf"{block}attn.qkv.weight"),
        (rf"{layer}self_attn\.qkv\.bias", drop_key_bias),
        (rf"{layer}self_attn\.([qv]_bias)", rf"{block}attn.\2"),
        (rf"{layer}self_attn\.projection\.(\w+)", rf"{block}attn.proj.\2"),
        (rf"{layer}mlp\.(fc[12])\.(\w+)", rf"{block}mlp.\2.\3"),
        (rf"{prefix}post_layernorm\.(\w+)", rf"{_OURS}norm.\1"),
    ]


def read_eva_tower(
    checkpoint: PublishedCheckpoint, prefix: str, num_heads: int | None = None, folder: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a tower's sizes from the shapes of its tensors.

    Args:
        checkpoint: has Transformers' names.
        prefix: what stands before `embeddings.`, `encoder.` and so on.
        num_heads: as its configuration says; shapes do not tell. None if there is no configuration.
        folder: where `preprocessor_config.json` may be.

    Returns:
        Settings of `composition["vision_encoder"]`, and OpenCLIP's configuration of the tower.

    Raises:
        CheckpointError: if OpenCLIP has no such tower.
    """
    width, _, patch, _ = checkpoint.shape(f"{prefix}embeddings.patch_embedding.weight")
    dim_ff = checkpoint.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0]
    tower = EVA_TOWERS.get((width, dim_ff, patch))
    if tower is None or (num_heads is not None and num_heads != tower.num_heads):
        heads = "" if num_heads is None else f", {num_heads} heads"
        raise CheckpointError(
            f"{checkpoint.name!r} has a vision encoder of {width} channels{heads}, {dim_ff} hidden channels and "
            f"patches of {patch} pixels. Of EVA's vision encoders, vlm reads {_list_towers()}."
        )
    depth = count_layers(checkpoint, rf"{prefix}encoder\.layers\.(\d+)\.")
    image_size = patch * isqrt(checkpoint.shape(f"{prefix}embeddings.position_embedding")[1] - 1)
    options = {"name": tower.openclip, "depth": depth}
    if image_size != tower.image_size:
        options["image_size"] = image_size
    vision_cfg = {
        "image_size": image_size,
        "timm_model_name": tower.timm,
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": None,
    }
    return options, {
        "embed_dim": tower.embed_dim,
        "vision_cfg": vision_cfg,
        "quick_gelu": False,
        "preprocess": read_preprocessing(folder, image_size, resize_mode="squash"),
        "depth": depth,
    }


def _list_towers() -> str:
    return " and ".join(
        f"{tower.openclip} ({width} channels, {tower.num_heads} heads, {dim_ff} hidden channels, patches of {patch} "
        "pixels)"
        for (width, dim_ff, patch), tower in EVA_TOWERS.items()
    )
