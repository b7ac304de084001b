"""SigLIP's vision transformer (https://arxiv.org/abs/2303.15343) as Transformers writes it, in OpenCLIP's terms.

OpenCLIP takes this tower from timm. Source: transformers/models/siglip/modeling_siglip.py, and
timm/models/vision_transformer.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlm_cli.checkpoint.parts.openclip import complete_preprocessing
from vlm_cli.checkpoint.published.targets import Rule, Target, stack_rows
from vlm_cli.errors import CheckpointError

__all__ = [
    "SIGLIP_OPTIONAL",
    "SIGLIP_PIXELS",
    "SIGLIP_TOWERS",
    "convert_siglip_config",
    "make_siglip_rules",
    "name_siglip_tower",
]

#: Names of the pooling head, which a VLM that reads patches does not need.
SIGLIP_OPTIONAL = r"vision_encoder\.visual\.trunk\.attn_pool\..*"

#: (channels, layers, heads, pixels of a patch's side) -> timm's name of a tower of these sizes. Its image size is free.
SIGLIP_TOWERS: dict[tuple[int, int, int, int], str] = {
    (768, 12, 12, 16): "vit_base_patch16_siglip_224",
    (768, 12, 12, 32): "vit_base_patch32_siglip_256",
    (1024, 24, 16, 16): "vit_large_patch16_siglip_256",
    (1152, 27, 16, 14): "vit_so400m_patch14_siglip_384",
    (1152, 27, 16, 16): "vit_so400m_patch16_siglip_256",
}

_OURS = "vision_encoder.visual.trunk."

#: How SigLIP's images are prepared where no file says it: OpenCLIP's words.
SIGLIP_PIXELS: Mapping[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}


def make_siglip_rules(prefix: str, width: int) -> list[Rule]:
    """Make the rules for the names of a tower.

    Args:
        prefix: pattern before `embeddings.`, `encoder.`, `post_layernorm.` and `head.`.
        width: channels. timm stacks the matrices of queries, keys and values, of `width` rows each.
    """
    block, pool = rf"{_OURS}blocks.\1.", f"{_OURS}attn_pool."

    def stack(match: re.Match[str]) -> list[Target]:
        number, which, kind = match.groups()
        return stack_rows(f"{_OURS}blocks.{number}.attn.qkv.{kind}", "qkv", which, width)

    def split_pooling(match: re.Match[str]) -> list[Target]:
        """Take queries apart from keys and values: in the pooling head it is Transformers that stacks them."""
        return [
            Target(f"{pool}q.{match[1]}", source_rows=slice(width)),
            Target(f"{pool}kv.{match[1]}", source_rows=slice(width, None)),
        ]

    layer = rf"{prefix}encoder\.layers\.(\d+)\."
    return [
        (rf"{prefix}embeddings\.patch_embedding\.(\w+)", rf"{_OURS}patch_embed.proj.\1"),
        (rf"{prefix}embeddings\.position_embedding\.weight", _add_batch_axis),
        (rf"{prefix}embeddings\.position_ids", None),
        (rf"{prefix}post_layernorm\.(\w+)", rf"{_OURS}norm.\1"),
        (rf"{layer}self_attn\.([qkv])_proj\.(weight|bias)", stack),
        (rf"{layer}self_attn\.out_proj\.(\w+)", rf"{block}attn.proj.\2"),
        (rf"{layer}layer_norm([12])\.(\w+)", rf"{block}norm\2.\3"),
        (rf"{layer}mlp\.(fc[12])\.(\w+)", rf"{block}mlp.\2.\3"),
        (rf"{prefix}head\.probe", f"{pool}latent"),
        (rf"{prefix}head\.attention\.in_proj_(\w+)", split_pooling),
        (rf"{prefix}head\.attention\.out_proj\.(\w+)", rf"{pool}proj.\1"),
        (rf"{prefix}head\.layernorm\.(\w+)", rf"{pool}norm.\1"),
        (rf"{prefix}head\.mlp\.(fc[12])\.(\w+)", rf"{pool}mlp.\1.\2"),
    ]


def _add_batch_axis(match: re.Match[str]) -> list[Target]:
    """Turn float[v, d] position embeddings into timm's float[1, v, d]."""
    return [Target(f"{_OURS}pos_embed", transform=_unsqueeze, restore=_squeeze)]


def _unsqueeze(x: Tensor) -> Tensor:
    return x.unsqueeze(0)


def _squeeze(x: Tensor) -> Tensor:
    return x.squeeze(0)


def convert_siglip_config(
    config: Mapping[str, Any], preprocess: Mapping[str, Any] | None = None, *, has_head: bool = False
) -> dict[str, Any]:
    """Turn Transformers' SigLIP vision configuration into OpenCLIP's.

    Args:
        config: `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `patch_size`, `image_size`, and perhaps
            `hidden_act` and `layer_norm_eps`.
        preprocess: settings of OpenCLIP's `PreprocessCfg` that differ from SigLIP's.
        has_head: whether the checkpoint holds the pooling head; without it, none is built.

    Raises:
        CheckpointError: for sizes, an activation or an epsilon that none of timm's towers has.
    """
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    sizes = (width, layers, config["num_attention_heads"], config["patch_size"])
    if sizes not in SIGLIP_TOWERS:
        raise CheckpointError(
            f"the vision encoder has {sizes[0]} channels, {sizes[1]} layers, {sizes[2]} heads and patches of "
            f"{sizes[3]} pixels; SigLIP's towers in timm have {', '.join(map(str, SIGLIP_TOWERS))}."
        )
    if (epsilon := config.get("layer_norm_eps", 1e-6)) != 1e-6:
        raise CheckpointError(f"the vision encoder has layer_norm_eps={epsilon}; timm's towers have 1e-06.")
    activation = config.get("hidden_act", "gelu_pytorch_tanh")
    if activation not in ("gelu", "gelu_pytorch_tanh"):
        raise CheckpointError(
            f"the vision encoder has activation {activation!r}; SigLIP's towers have gelu_pytorch_tanh."
        )
    vision_cfg: dict[str, Any] = {
        "image_size": config["image_size"],
        "timm_model_name": SIGLIP_TOWERS[sizes],
        "timm_pool": "map" if has_head else "",
        "timm_proj": "none",
    }
    if activation == "gelu_pytorch_tanh":
        # timm builds the first SigLIP's towers with the exact GELU, whose outputs differ by up to 5e-4 in one layer.
        vision_cfg["act_kwargs"] = {"approximate": "tanh"}
    own = {"size": config["image_size"], **SIGLIP_PIXELS}
    return {
        "embed_dim": width,
        "vision_cfg": vision_cfg,
        "quick_gelu": False,
        "preprocess": complete_preprocessing({**own, **(preprocess or {})}),
    }


def name_siglip_tower(config: Mapping[str, Any]) -> str:
    """Return OpenCLIP's name of the tower with these sizes, or a general word."""
    sizes = (config["hidden_size"], config["num_hidden_layers"], config["patch_size"], config["image_size"])
    return _NAMES.get(sizes, "siglip-vision-transformer")


#: (channels, layers, pixels of a patch's side, pixels of an image's side) -> OpenCLIP's name.
_NAMES = {
    (768, 12, 16, 224): "ViT-B-16-SigLIP",
    (768, 12, 16, 256): "ViT-B-16-SigLIP-256",
    (768, 12, 16, 384): "ViT-B-16-SigLIP-384",
    (768, 12, 16, 512): "ViT-B-16-SigLIP-512",
    (1024, 24, 16, 256): "ViT-L-16-SigLIP-256",
    (1024, 24, 16, 384): "ViT-L-16-SigLIP-384",
    (1152, 27, 14, 224): "ViT-SO400M-14-SigLIP",
    (1152, 27, 14, 384): "ViT-SO400M-14-SigLIP-384",
}
