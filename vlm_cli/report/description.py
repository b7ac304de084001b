"""A model's parts with the shapes along the data flow, its tokens, preprocessing and gates."""

from __future__ import annotations

from typing import Any

import torch

from vlm_cli.modeling.language_model import context_length, widths
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.report.parameters import count_parameters

__all__ = ["describe"]


def describe(
    model: VLM, tokenizer: Any, *, gate_values: dict[str, float], dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Everything that `vlm inspect` shows, as plain data.

    Args:
        model: on any device; shapes are enough.
        tokenizer: for the ids of special tokens; None leaves them out.
        gate_values: tanh of each gate, by name.
        dtype: what the weights are, if the model does not hold them.
    """
    config, parts = model.config, model.config.composition
    text = config.get_text_config(decoder=True)
    preprocess = config.vision_config["preprocess"]
    size = preprocess["size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    v, d = config.vision_config["num_patches"], config.vision_config["dim"]
    n, dim_out = model.vision_tokenizer.num_tokens(), model.vision_tokenizer.dim_out
    width_of = widths(model.lang_model)
    report = count_parameters(model, dtype=dtype)
    return {
        "family": parts.family,
        "class": type(model).__name__,
        "dtype": report.dtype,
        "parameters": report.total.parameters,
        "bytes": report.total.bytes,
        "vision_encoder": {
            "name": parts.vision_encoder.name,
            "pretrained": parts.vision_encoder.pretrained,
            "class": _tower_class(model),
            "layer": parts.vision_encoder.layer,
            **parts.vision_encoder.openclip_settings,
            "preprocessing": preprocess,
        },
        "vision_tokenizer": parts.vision_tokenizer.to_dict(),
        "fusion": {**parts.fusion.to_dict(), **_blocks(model)},
        "language_model": {
            "name": parts.language_model.name,
            "class": type(model.lang_model).__name__,
            "type": text.model_type,
            "layers": getattr(text, "num_hidden_layers", None),
            "embedding_channels": width_of.embedding,
            "layer_channels": width_of.layer,
            "context": context_length(config),
        },
        "shapes": {
            "vision_x": ["B", "T_img", "F", 3, height, width],
            "features": ["B", "T_img", "F", v, d],
            "vision_tokens": ["B", "T_img", n, dim_out],
            "lang_x": ["B", "T_txt"],
            "logits": ["B", "T_txt", config.first_added_id + len(config.added_tokens)],
        },
        "positions_per_image": model.num_positions(),
        "tokens": _tokens(model, tokenizer),
        "trainable": list(parts.trainable),
        "weight_decay": {"value": parts.weight_decay, "on": list(parts.weight_decay_on)},
        "gates": gate_values,
        "parts": [vars(row) for row in report.rows],
    }


def _tower_class(model: VLM) -> str:
    visual = model.vision_encoder.visual
    trunk = getattr(visual, "trunk", None)
    return type(visual).__name__ if trunk is None else f"{type(visual).__name__}({type(trunk).__name__})"


def _blocks(model: VLM) -> dict[str, Any]:
    layers = model.block_layers
    return {"before_layers": layers} if layers else {}


def _tokens(model: VLM, tokenizer: Any) -> dict[str, Any]:
    config = model.config
    added = {token: config.first_added_id + i for i, token in enumerate(config.added_tokens)}
    stops = list(stop_token_ids(model.generation_config)) or None
    result = {"added": added, "media": config.media_token_id, "pad": config.pad_token_id, "stop": stops}
    if tokenizer is not None:
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        result["special"] = special
    return result
