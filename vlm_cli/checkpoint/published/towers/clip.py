"""CLIP's vision transformer as Transformers writes it, in OpenCLIP's terms.

Source: transformers/models/clip/modeling_clip.py, and open_clip/transformer.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_cli.checkpoint.parts.openclip import complete_preprocessing
from vlm_cli.checkpoint.published.layouts.base import Target
from vlm_cli.errors import CheckpointError

__all__ = ["CLIP_UNNEEDED", "clip_table", "clip_vision_config", "read_preprocessing"]

#: What OpenCLIP's tower has after the last layer, and a VLM that reads patches does not use.
CLIP_UNNEEDED = r"vision_encoder\.visual\.proj"

_OURS = "vision_encoder.visual."


def clip_table(prefix: str, width: int) -> list[tuple[str, Any]]:
    """TargetsOf of a vision transformer's tensors.

    Args:
        prefix: pattern before `embeddings.`, `encoder.` and so on.
        width: channels; queries, keys and values are one matrix of thrice as many rows in OpenCLIP.
    """
    block = rf"{_OURS}transformer.resblocks.\1."

    def rows(match: Any) -> list[Target]:
        number, which, kind = match.groups()
        start = "qkv".index(which) * width
        return [
            Target(
                f"{_OURS}transformer.resblocks.{number}.attn.in_proj_{kind}", target_rows=slice(start, start + width)
            )
        ]

    layer = rf"{prefix}encoder\.layers\.(\d+)\."
    return [
        (rf"{prefix}embeddings\.class_embedding", f"{_OURS}class_embedding"),
        (rf"{prefix}embeddings\.patch_embedding\.weight", f"{_OURS}conv1.weight"),
        (rf"{prefix}embeddings\.position_embedding\.weight", f"{_OURS}positional_embedding"),
        (rf"{prefix}embeddings\.position_ids", None),
        # The misspelling is Transformers'.
        (rf"{prefix}pre_?layrnorm\.(\w+)", rf"{_OURS}ln_pre.\1"),
        (rf"{prefix}post_layernorm\.(\w+)", rf"{_OURS}ln_post.\1"),
        (rf"{layer}self_attn\.([qkv])_proj\.(weight|bias)", rows),
        (rf"{layer}self_attn\.out_proj\.(\w+)", rf"{block}attn.out_proj.\2"),
        (rf"{layer}layer_norm([12])\.(\w+)", rf"{block}ln_\2.\3"),
        (rf"{layer}mlp\.fc1\.(\w+)", rf"{block}mlp.c_fc.\2"),
        (rf"{layer}mlp\.fc2\.(\w+)", rf"{block}mlp.c_proj.\2"),
    ]


def clip_vision_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """OpenCLIP's configuration of a Transformers' CLIP vision configuration.

    Raises:
        CheckpointError: for an activation that OpenCLIP's tower does not have.
    """
    width, heads = config["hidden_size"], config["num_attention_heads"]
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"the vision encoder has activation {activation!r}; OpenCLIP's has gelu or quick_gelu.")
    vision_cfg = {
        "image_size": config["image_size"],
        "layers": config["num_hidden_layers"],
        "width": width,
        "head_width": width // heads,
        "patch_size": config["patch_size"],
        "mlp_ratio": config["intermediate_size"] / width,
    }
    return {
        "embed_dim": config.get("projection_dim") or width,
        "vision_cfg": vision_cfg,
        "quick_gelu": activation == "quick_gelu",
        "preprocess": read_preprocessing(folder, config["image_size"]),
    }


_PIL = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def read_preprocessing(folder: Path | None, image_size: int, *, resize_mode: str = "shortest") -> dict[str, Any]:
    """OpenCLIP's description of what `preprocessor_config.json` says; CLIP's own where there is none.

    Args:
        folder: where the file may be; None if there is none.
        image_size: pixels.
        resize_mode: OpenCLIP's name of how images are resized, where the file does not say.

    Raises:
        CheckpointError: if images would be prepared in a way that OpenCLIP does not have.
    """
    given: dict[str, Any] = {"size": image_size, "resize_mode": resize_mode}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if folder is None or not (file := folder / name).is_file():
            continue
        data = json.loads(file.read_text(encoding="utf-8"))
        data = data.get("image_processor", data)
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            if theirs in data:
                given[ours] = tuple(data[theirs])
        if "resample" in data:
            if data["resample"] not in _PIL:
                raise CheckpointError(f"{name} resizes images by method {data['resample']}, which OpenCLIP lacks.")
            given["interpolation"] = _PIL[data["resample"]]
        if isinstance(data.get("size"), Mapping):
            given["resize_mode"] = "shortest" if "shortest_edge" in data["size"] else "squash"
    return complete_preprocessing(given)
