"""LLaVA-NeXT (LLaVA-1.6), LLaVA-NeXT-Video and LLaVA-OneVision, as Transformers writes them.

Sources: transformers/models/llava_next, transformers/models/llava_next_video, transformers/models/llava_onevision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import LlavaNextConfig, LlavaNextVideoConfig, LlavaOnevisionConfig, PreTrainedConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_parts import MODEL, HFParts, make_language_model_rules, read_parts
from vlm_cli.checkpoint.published.settings import Settings
from vlm_cli.checkpoint.published.targets import Rule, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.schema import show

__all__ = ["HuggingFaceLLaVANeXT", "HuggingFaceLLaVANeXTVideo", "HuggingFaceLLaVAOneVision"]

_READ = {
    *("vision_config", "text_config", "image_token_index", "image_token_id", "vision_feature_select_strategy"),
    *("vision_feature_layer", "multimodal_projector_bias", "image_grid_pinpoints"),
}
_WITHOUT_EFFECT = {"image_seq_length", "tie_word_embeddings", "ignore_index", "pad_token_id"}
#: Settings of the image processor that say how a picture is cut; `do_pad` pads the pixels of a batch.
_CUTS = {"image_grid_pinpoints", "do_pad", "size", "crop_size", "do_center_crop"}
_PROJECTOR: list[Rule] = [
    (rf"{MODEL}multi_modal_projector\.linear_1\.(\w+)", r"vision_tokenizer.proj.0.\1"),
    (rf"{MODEL}multi_modal_projector\.linear_2\.(\w+)", r"vision_tokenizer.proj.2.\1"),
    (rf"{MODEL}image_newline", "vision_tokenizer.arrangement.newline"),
]


class HuggingFaceLLaVANeXT:
    """`image_newline` beside LLaVA's parts, with a `config.json` of type `llava_next`."""

    name = "LLaVA-NeXT (Hugging Face)"
    source = "transformers/models/llava_next/modeling_llava_next.py"
    model_type = "llava_next"
    #: How pictures are prepared where no file says it.
    like: Mapping[str, Any] = {}
    settings = Settings(
        config=LlavaNextConfig,
        read=_READ,
        without_effect=_WITHOUT_EFFECT,
        fixed={"projector_hidden_act": ("gelu",)},
    )

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the newline and the configuration's type."""
        has_newline = any(re.fullmatch(rf"{MODEL}image_newline", name) for name in checkpoint.tensors)
        return has_newline and checkpoint.config.get("model_type") == self.model_type

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts, and its tokenizer has `<image>`."""
        parts = read_parts(checkpoint, self.settings, cuts=_CUTS, like=self.like)
        config: Any = parts.config
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {"name": f"hf:{checkpoint.name}", **_read_features(checkpoint.name, config)},
                "vision_tokenizer": {"type": "mlp", "bias": config.multimodal_projector_bias},
                "fusion": "language-stream",
                "tiling": {"type": "anyres", "pinpoints": _read_pinpoints(checkpoint.name, parts), **self.cut(config)},
                "language_model": {"name": checkpoint.name},
                "added_tokens": self.added_tokens(config),
                "trainable": ["vision_tokenizer", "language_model"],
            },
            targets_for=lambda ours: make_targets_of(
                [*_PROJECTOR, *parts.rules, *make_language_model_rules(checkpoint, ours)]
            ),
            text_config=parts.text_config,
            vision_config=parts.vision_config,
            first_added_id=config.image_token_index - self.added_tokens(config).index(MEDIA_TOKEN),
            optional_pattern=parts.optional,
            notes=self.notes,
        )

    def cut(self, config: Any) -> dict[str, Any]:
        """Return the settings of the tiling beside its pinpoints."""
        return {}

    def added_tokens(self, config: Any) -> list[str]:
        """Return the tokens from `<image>` on that have rows of their own."""
        return [MEDIA_TOKEN]

    notes: tuple[str, ...] = ()


class HuggingFaceLLaVANeXTVideo(HuggingFaceLLaVANeXT):
    """LLaVA-NeXT's parts, with a `config.json` of type `llava_next_video`: the patches of clips are pooled."""

    name = "LLaVA-NeXT-Video (Hugging Face)"
    source = "transformers/models/llava_next_video/modeling_llava_next_video.py"
    model_type = "llava_next_video"
    settings = Settings(
        config=LlavaNextVideoConfig,
        read=_READ | {"video_token_index", "video_token_id", "spatial_pool_stride"},
        without_effect=_WITHOUT_EFFECT | {"video_seq_length"},
        fixed={"projector_hidden_act": ("gelu",), "spatial_pool_mode": ("average",)},
    )

    def cut(self, config: Any) -> dict[str, Any]:
        return {"clip_pool": config.spatial_pool_stride, "clip_newline": False, "clip_crop": True}

    def added_tokens(self, config: Any) -> list[str]:
        precedes = config.video_token_index == config.image_token_index - 1
        return ["<video>", MEDIA_TOKEN] if precedes else super().added_tokens(config)


class HuggingFaceLLaVAOneVision(HuggingFaceLLaVANeXT):
    """LLaVA-NeXT's parts over a SigLIP, with a `config.json` of type `llava_onevision`."""

    name = "LLaVA-OneVision (Hugging Face)"
    source = "transformers/models/llava_onevision/modeling_llava_onevision.py"
    model_type = "llava_onevision"
    like = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    settings = Settings(
        config=LlavaOnevisionConfig,
        read=_READ | {"video_token_index", "video_token_id", "vision_aspect_ratio"},
        without_effect=_WITHOUT_EFFECT,
        fixed={"projector_hidden_act": ("gelu",)},
    )
    notes = (
        "LLaVA-OneVision's own code cuts a picture into tiles only where it is the only one of its prompt; vlm cuts "
        "every picture. --max-tiles cuts fewer.",
    )

    def cut(self, config: Any) -> dict[str, Any]:
        found = re.fullmatch(r"anyres_max_(\d+)", config.vision_aspect_ratio)
        if found is None:
            raise CheckpointError(
                f"the checkpoint has vision_aspect_ratio={show(config.vision_aspect_ratio)}; vlm builds anyres_max_ "
                "and a number of tiles."
            )
        return {
            "shrink_beyond": int(found[1]),
            "clip_pool": 2,
            "clip_pool_by": "bilinear",
            "clip_pool_at": "after",
        }

    def added_tokens(self, config: Any) -> list[str]:
        follows = config.video_token_index == config.image_token_index + 1
        return [MEDIA_TOKEN, "<video>"] if follows else [MEDIA_TOKEN]


def _read_features(name: str, config: Any) -> dict[str, Any]:
    """Read which features of the vision encoder are projected.

    Raises:
        CheckpointError: for features that vlm does not have.
    """
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    if not isinstance(layer, int) or (strategy == "default") != has_class_token:
        raise CheckpointError(
            f"{name!r} takes features of layers {layer!r} of a {config.vision_config.model_type} by strategy "
            f"{strategy!r}; vlm takes the patches of a single layer, without a class token."
        )
    depth = config.vision_config.num_hidden_layers
    return {"layer": layer if layer < 0 else layer - depth - 1, "norm": False}


def _read_pinpoints(name: str, parts: HFParts) -> list[list[int]]:
    """Read the canvases, of which the model and its image processor each have a list.

    Raises:
        CheckpointError: if the lists differ.
    """
    config: PreTrainedConfig = parts.config
    pinpoints: list[list[int]] = [list(x) for x in config.image_grid_pinpoints]
    given = parts.images.get("image_grid_pinpoints")
    if given is not None and [list(x) for x in given] != pinpoints:
        raise CheckpointError(
            f"{name!r} has other image_grid_pinpoints in its config.json than in the file of its image processor. "
            "Restore the published files."
        )
    return pinpoints
