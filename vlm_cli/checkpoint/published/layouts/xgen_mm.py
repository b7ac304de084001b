"""xGen-MM, also called BLIP-3 (https://arxiv.org/abs/2408.08872), which grew out of open_flamingo's later code base.

Source: https://github.com/salesforce/LAVIS, branch `xgen-mm`: `open_flamingo/src/xgenmm.py` and `vlm.py`; and
`modeling_xgenmm.py` of https://huggingface.co/Salesforce/xgen-mm-phi3-mini-base-r-v1.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, TargetsOf, number_of, renamer
from vlm_cli.checkpoint.published.layouts.open_flamingo_v3 import check_bias, decoupled_table, has_bias
from vlm_cli.checkpoint.published.layouts.openflamingo import attention_channels, check_heads, perceiver_options
from vlm_cli.checkpoint.published.towers.siglip import (
    SIGLIP_TOWERS,
    SIGLIP_UNNEEDED,
    siglip_name,
    siglip_table,
    siglip_vision_config,
)
from vlm_cli.checkpoint.weights import OPEN_FLAMINGO_NAMES
from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["XGenMM"]

_HEAD_WIDTH = 96  # of every published model; shapes give only heads × width
_ADDED = [MEDIA_TOKEN, "<image placeholder>", END_OF_CHUNK]
_TOWER = r"vision_encoder\.(?:vision_model\.)?"
_ROWS = "lang_model.model.embed_tokens.additional_embedding.weight"


class XGenMM:
    """`vision_encoder.*` of Transformers' SigLIP, a projected Perceiver, and a language model with three added rows."""

    name = "xGen-MM"
    source = "https://github.com/salesforce/LAVIS/blob/xgen-mm/open_flamingo/src/xgenmm.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        names = checkpoint.tensors
        for prefix in ("vlm.", ""):
            rows = names.get(f"{prefix}{_ROWS}")
            if f"{prefix}vision_tokenizer.projection.weight" in names and rows is not None:
                return rows.shape[0] == len(_ADDED)
        return False

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        prefix = "vlm." if f"vlm.{_ROWS}" in checkpoint.tensors else ""
        inner = attention_channels(checkpoint, rf"{re.escape(prefix)}vision_tokenizer\.")
        heads = {} if inner % _HEAD_WIDTH else {"num_heads": inner // _HEAD_WIDTH, "head_dim": _HEAD_WIDTH}
        tower, name = _tower(checkpoint, prefix)
        text = checkpoint.config.get("text_config")
        is_phi = checkpoint.shape(f"{prefix}{_ROWS}")[1] == 3072
        first = text.get("initial_tokenizer_len") if text and _knows_media(checkpoint.folder) else None
        return CheckpointDescription(
            composition={
                "family": "kosmos",
                "vision_encoder": name,
                "vision_tokenizer": {
                    "type": "perceiver",
                    **perceiver_options(checkpoint, f"{prefix}vision_tokenizer."),
                    **heads,
                },
                # The code gives the head a bias that Phi-3 does not have, and it was trained.
                "language_model": {
                    "name": checkpoint.name if text else "microsoft/Phi-3-mini-4k-instruct" if is_phi else "",
                    "head_bias": has_bias(checkpoint),
                },
                "added_tokens": _ADDED,
                "trainable": ["vision_tokenizer", "added_tokens", "language_model"],
            },
            places=lambda config: _places(checkpoint, config, prefix),
            text_config=None if text is None else _text_config(text),
            holds_language_model=text is None,
            vision_config=tower,
            first_added_id=first,
            # A pad token has no row in the file.
            optional_pattern=rf"{SIGLIP_UNNEEDED}|added_tokens\.(embedding|head)\.\w+",
            notes=(
                "xGen-MM cuts an image in tiles and shows all of them and the whole; vlm shows the whole image alone.",
            ),
        )


def _tower(checkpoint: PublishedCheckpoint, prefix: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Configuration of the tower in the files, if it is there, and what a composition calls it."""
    pattern = f"{re.escape(prefix)}{_TOWER}"

    def shape(name: str) -> tuple[int, ...] | None:
        found = (info.shape for x, info in checkpoint.tensors.items() if re.fullmatch(rf"{pattern}{name}", x))
        return next(found, None)

    patch, positions = shape(r"embeddings\.patch_embedding\.weight"), shape(r"embeddings\.position_embedding\.weight")
    if patch is None or positions is None:
        if checkpoint.shape(f"{prefix}vision_tokenizer.latents")[1] != 1152:
            return None, {"name": ""}
        return None, {"name": "ViT-SO400M-14-SigLIP-384", "pretrained": "webli"}
    width, size, layers = patch[0], patch[-1], number_of(checkpoint, rf"{pattern}encoder\.layers\.(\d+)\.")
    heads = {(w, n, p): h for w, n, h, p in SIGLIP_TOWERS}
    if (width, layers, size) not in heads:
        raise CheckpointError(
            f"{checkpoint.name!r} has a vision encoder of {width} channels, {layers} layers and patches of {size} "
            f"pixels, which is none of SigLIP's: {', '.join(map(str, heads))}."
        )
    side = isqrt(positions[0])
    vision = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[width, layers, size],
        "patch_size": size,
        "image_size": 384 if (side, size) == (27, 14) else side * size,  # 6 pixels are left over
    }
    has_head = shape(r"head\.probe") is not None
    return siglip_vision_config(vision, has_head=has_head), {"name": siglip_name(vision)}


def _text_config(text: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's configuration without what older releases wrote into it: settings of generation, of
    attention kernels, and of other tasks."""
    kind = text.get("model_type", "phi3")
    known = {*AutoConfig.for_model(kind).to_dict(), "rope_theta", "rope_scaling"} - {"transformers_version", "dtype"}
    kept = {key: value for key, value in text.items() if key in known and not key.startswith(("_", "output_"))}
    return {**kept, "model_type": kind}


def _knows_media(folder: Path) -> bool:
    """Whether the tokenizer has `<image>`; as published it gets it, and the others, when the model is loaded."""
    files = [folder / name for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")]
    return any(f'"{MEDIA_TOKEN}"' in file.read_text(encoding="utf-8") for file in files if file.is_file())


def _places(checkpoint: PublishedCheckpoint, config: VLMConfig, prefix: str) -> TargetsOf:
    options = config.composition.vision_tokenizer.options
    check_heads(checkpoint, rf"{re.escape(prefix)}vision_tokenizer\.", "vision_tokenizer", options)
    check_bias(checkpoint, config)
    width = checkpoint.shape(f"{prefix}vision_tokenizer.latents")[1]
    table = [*siglip_table(_TOWER, width), *decoupled_table(config), *OPEN_FLAMINGO_NAMES, (r"(.*)", r"\1")]
    places = renamer(table)
    return lambda name: places(name.removeprefix(prefix))
