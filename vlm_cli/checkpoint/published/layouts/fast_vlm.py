"""FastVLM (https://arxiv.org/abs/2412.13303), as Transformers writes it: LLaVA over a FastViT of timm.

Source: transformers/models/fast_vlm, `FastVlmForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import FastVlmConfig, TimmWrapperConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_parts import MODEL, make_language_model_rules
from vlm_cli.checkpoint.published.preprocessing import (
    PADS_TO_SQUARES,
    pads_to_squares,
    read_image_settings,
    read_preprocessing,
)
from vlm_cli.checkpoint.published.settings import Settings, check_settings_of
from vlm_cli.checkpoint.published.targets import Rule, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.trust import make_config

__all__ = ["HuggingFaceFastVLM"]

_SETTINGS = Settings(
    config=FastVlmConfig,
    read={"vision_config", "text_config", "image_token_index", "image_token_id", "multimodal_projector_bias"},
    without_effect={"image_seq_length", "tie_word_embeddings", "pad_token_id"},
    fixed={
        "projector_hidden_act": ("gelu",),
        "vision_feature_select_strategy": ("full",),
        "vision_feature_layer": (-1,),
    },
)
_VISION = Settings(
    config=TimmWrapperConfig,
    read={"architecture", "model_args"},
    without_effect={"do_pooling", "global_pool", "hidden_size", "initializer_range", "label_names", "num_classes"},
)
_SIZE = 1024  # pixels of a side, where no file says it
_PIXELS = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
_RULES: list[Rule] = [
    (rf"{MODEL}vision_tower\.timm_model\.(.*)", r"vision_encoder.visual.trunk.\1"),
    (rf"{MODEL}multi_modal_projector\.linear_1\.(\w+)", r"vision_tokenizer.proj.0.\1"),
    (rf"{MODEL}multi_modal_projector\.linear_2\.(\w+)", r"vision_tokenizer.proj.2.\1"),
]


class HuggingFaceFastVLM:
    """A model of timm as `vision_tower`, and LLaVA's other parts, with a `config.json` of type `fast_vlm`."""

    name = "FastVLM (Hugging Face)"
    source = "transformers/models/fast_vlm/modeling_fast_vlm.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projector's first matrix and the configuration's type."""
        return checkpoint.config.get("model_type") == "fast_vlm" and any(
            name.endswith("multi_modal_projector.linear_1.weight") for name in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts, and its tokenizer has `<image>`."""
        data = dict(checkpoint.config)
        check_settings_of(checkpoint.name, "", data, _SETTINGS)
        check_settings_of(checkpoint.name, "vision_config", data.get("vision_config") or {}, _VISION)
        config: Any = make_config(data.pop("model_type"), **data)
        vision = config.vision_config
        text = config.text_config.to_dict()
        if not any(name.endswith("lm_head.weight") for name in checkpoint.tensors):
            text["tie_word_embeddings"] = True
        size = _read_size(read_image_settings(checkpoint.folder))
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {"name": f"timm:{vision.architecture}"},
                "vision_tokenizer": {"type": "mlp", "bias": config.multimodal_projector_bias},
                "fusion": "language-stream",
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "language_model"],
            },
            targets_for=lambda ours: make_targets_of([*_RULES, *make_language_model_rules(checkpoint, ours)]),
            text_config=text,
            vision_config={
                "type": "timm",
                "name": vision.architecture,
                "args": dict(vision.model_args or {}),  # of which vlm allows those that load no file
                "vision_cfg": {"image_size": size},
                "preprocess": read_preprocessing(checkpoint.folder, size, like=_PIXELS),
            },
            first_added_id=config.image_token_index,
            notes=(PADS_TO_SQUARES,) if pads_to_squares(checkpoint.folder) else (),
        )


def _read_size(images: Mapping[str, Any]) -> int:
    """Read the pixels of a side of what the vision encoder reads."""
    size = images.get("crop_size") or images.get("size") or _SIZE
    return int(next(x for x in size.values() if x is not None) if isinstance(size, Mapping) else size)
