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

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.open_flamingo_v3 import check_bias, has_bias, make_added_row_rules
from vlm_cli.checkpoint.published.layouts.own import OWN_RULES
from vlm_cli.checkpoint.published.layouts.parts import check_heads, guess_heads, read_perceiver_options
from vlm_cli.checkpoint.published.shapes import count_layers, find_shape
from vlm_cli.checkpoint.published.targets import TargetsOf, make_targets_of
from vlm_cli.checkpoint.published.towers.siglip import (
    SIGLIP_OPTIONAL,
    SIGLIP_TOWERS,
    convert_siglip_config,
    make_siglip_rules,
    name_siglip_tower,
)
from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.trust import make_config

__all__ = ["XGenMM"]

_HEAD_DIM = 96  # channels of a head in every published model
_ADDED = [MEDIA_TOKEN, "<image placeholder>", END_OF_CHUNK]
_TOWER = r"vision_encoder\.(?:vision_model\.)?"
_ROWS = "lang_model.model.embed_tokens.additional_embedding.weight"


class XGenMM:
    """`vision_encoder.*` of Transformers' SigLIP, a projected Perceiver, and a language model with three added rows."""

    name = "xGen-MM"
    source = "https://github.com/salesforce/LAVIS/blob/xgen-mm/open_flamingo/src/xgenmm.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for a projected Perceiver and three added rows."""
        names = checkpoint.tensors
        for prefix in ("vlm.", ""):
            rows = names.get(f"{prefix}{_ROWS}")
            if f"{prefix}vision_tokenizer.projection.weight" in names and rows is not None:
                return rows.shape[0] == len(_ADDED)
        return False

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from shapes, and the language model from `config.json`; training writes files without one."""
        prefix = "vlm." if f"vlm.{_ROWS}" in checkpoint.tensors else ""
        tower, name = _find_tower(checkpoint, prefix)
        text = checkpoint.config.get("text_config")
        is_phi = checkpoint.shape(f"{prefix}{_ROWS}")[1] == 3072
        first = text.get("initial_tokenizer_len") if text and _has_media_token(checkpoint.folder) else None
        return CheckpointDescription(
            composition={
                "family": "kosmos",
                "vision_encoder": name,
                "vision_tokenizer": {
                    "type": "perceiver",
                    **read_perceiver_options(checkpoint, f"{prefix}vision_tokenizer."),
                    **guess_heads(checkpoint, rf"{re.escape(prefix)}vision_tokenizer\.", _HEAD_DIM),
                    "frames": "apart",
                },
                "tiling": _read_tiling(checkpoint, _TILE if tower is None else tower["preprocess"]["size"]),
                # The code adds a bias to the head, which Phi-3 does not have, and trains it.
                "language_model": {
                    "name": checkpoint.name if text else "microsoft/Phi-3-mini-4k-instruct" if is_phi else "",
                    "head_bias": has_bias(checkpoint),
                },
                "added_tokens": _ADDED,
                "trainable": ["vision_tokenizer", "added_tokens", "language_model"],
            },
            targets_for=lambda config: _make_targets(checkpoint, config, prefix),
            text_config=None if text is None else _convert_text_config(text),
            holds_language_model=text is None,
            vision_config=tower,
            first_added_id=first,
            # vlm may add a pad token, which has no row in the file.
            optional_pattern=rf"{SIGLIP_OPTIONAL}|added_tokens\.(embedding|head)\.\w+",
        )


def _read_tiling(checkpoint: PublishedCheckpoint, tile: int) -> dict[str, Any]:
    """Read how pictures are cut. xGen-MM's code names the canvases, in tiles; files of training name nothing.

    Raises:
        CheckpointError: if the vision tokenizer reads all tiles together.
    """
    settings = checkpoint.config.get("vision_encoder_config") or {}
    if settings.get("image_aspect_ratio", "anyres") != "anyres":
        return {"type": "none"}
    if not settings.get("anyres_patch_sampling", True):
        raise CheckpointError(
            f"{checkpoint.name!r} has vision_encoder_config.anyres_patch_sampling=false; vlm builds the models whose "
            "Perceiver reads a picture's tiles one by one."
        )
    pinpoints = [[rows * tile, columns * tile] for columns, rows in _CANVASES]
    return {"type": "anyres", "pinpoints": pinpoints, "newline": False, "bands": True}


#: Columns and rows of tiles on the canvases of the code's `anyres_grids`.
_CANVASES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_TILE = 384  # pixels that SigLIP reads in every published model


def _find_tower(checkpoint: PublishedCheckpoint, prefix: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Find the vision encoder.

    Returns:
        OpenCLIP's configuration of a tower in the files, or None; settings of `composition["vision_encoder"]`.

    Raises:
        CheckpointError: if the files hold a tower that is none of SigLIP's.
    """
    pattern = f"{re.escape(prefix)}{_TOWER}"
    patch = find_shape(checkpoint, rf"{pattern}embeddings\.patch_embedding\.weight")
    positions = find_shape(checkpoint, rf"{pattern}embeddings\.position_embedding\.weight")
    if patch is None or positions is None:
        if checkpoint.shape(f"{prefix}vision_tokenizer.latents")[1] != 1152:
            return None, {"name": ""}
        return None, {"name": "ViT-SO400M-14-SigLIP-384", "pretrained": "webli"}
    width, size, layers = patch[0], patch[-1], count_layers(checkpoint, rf"{pattern}encoder\.layers\.(\d+)\.")
    heads = {(w, n, p): h for w, n, h, p in SIGLIP_TOWERS}
    if (width, layers, size) not in heads:
        raise CheckpointError(
            f"{checkpoint.name!r} has a vision encoder of {width} channels, {layers} layers and patches of {size} "
            f"pixels. SigLIP's vision encoders have (channels, layers, pixels) {', '.join(map(str, heads))}."
        )
    side = isqrt(positions[0])
    vision = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[width, layers, size],
        "patch_size": size,
        "image_size": 384 if (side, size) == (27, 14) else side * size,  # patches leave 6 pixels over
    }
    has_head = find_shape(checkpoint, rf"{pattern}head\.probe") is not None
    return convert_siglip_config(vision, has_head=has_head), {"name": name_siglip_tower(vision)}


def _convert_text_config(text: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings that the language model's type has.

    Older releases wrote others beside them: of generation, of attention kernels, and of other tasks.
    """
    kind = text.get("model_type", "phi3")
    known = {*make_config(kind).to_dict(), "rope_theta", "rope_scaling"} - {"transformers_version", "dtype"}
    kept = {key: value for key, value in text.items() if key in known and not key.startswith(("_", "output_"))}
    return {**kept, "model_type": kind}


def _has_media_token(folder: Path) -> bool:
    """Say whether the tokenizer's files have `<image>`; xGen-MM's code adds its tokens only when it loads a model."""
    files = [folder / name for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")]
    return any(f'"{MEDIA_TOKEN}"' in file.read_text(encoding="utf-8") for file in files if file.is_file())


def _make_targets(checkpoint: PublishedCheckpoint, config: VLMConfig, prefix: str) -> TargetsOf:
    """Make the lookup of targets for a VLM of this configuration.

    Raises:
        CheckpointError: if the composition has other heads or biases than the checkpoint.
    """
    options = config.composition.vision_tokenizer.options
    check_heads(checkpoint, rf"{re.escape(prefix)}vision_tokenizer\.", "vision_tokenizer", options)
    check_bias(checkpoint, config)
    width = checkpoint.shape(f"{prefix}vision_tokenizer.latents")[1]
    targets_of = make_targets_of([*make_siglip_rules(_TOWER, width), *make_added_row_rules(config), *OWN_RULES])
    return lambda name: targets_of(name.removeprefix(prefix))
