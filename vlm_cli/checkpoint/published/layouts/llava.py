"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744), as Transformers writes it and as its authors do.

Sources: transformers/models/llava, `LlavaForConditionalGeneration`, with the names of releases before and after 4.52;
https://github.com/haotian-liu/LLaVA, `llava/model/llava_arch.py` and `llava/model/multimodal_encoder/clip_encoder.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, Target, TargetsOf, number_of, renamer
from vlm_cli.checkpoint.published.towers.clip import CLIP_UNNEEDED, clip_table, clip_vision_config
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["HuggingFaceLLaVA", "OriginalLLaVA"]

_MODEL = r"(?:model\.)?"


class HuggingFaceLLaVA:
    """`vision_tower`, `multi_modal_projector` and `language_model`, with a `config.json` of type `llava`."""

    name = "LLaVA (Hugging Face)"
    source = "transformers/models/llava/modeling_llava.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        return checkpoint.config.get("model_type") == "llava" and any(
            name.endswith("multi_modal_projector.linear_1.weight") for name in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        config = checkpoint.config
        vision, text = config["vision_config"], dict(config["text_config"])
        vision = {**_CLIP_LARGE, **vision}
        text.setdefault("model_type", "llama")
        layer, strategy = (
            config.get("vision_feature_layer", -2),
            config.get("vision_feature_select_strategy", "default"),
        )
        if not isinstance(layer, int) or strategy not in ("default", "full"):
            raise CheckpointError(
                f"{checkpoint.name!r} takes features of layers {layer!r} by strategy {strategy!r}; vlm takes one "
                "layer, with or without its class token."
            )
        media_id = config.get("image_token_index", config.get("image_token_id", 32000))
        table: list[tuple[str, Any]] = [
            *clip_table(rf"{_MODEL}vision_tower\.(?:vision_model\.)?", vision["hidden_size"]),
            (rf"{_MODEL}multi_modal_projector\.linear_1\.(\w+)", r"vision_tokenizer.proj.0.\1"),
            (rf"{_MODEL}multi_modal_projector\.linear_2\.(\w+)", r"vision_tokenizer.proj.2.\1"),
        ]
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {
                    "name": _name(vision),
                    "layer": layer if layer < 0 else layer - vision["num_hidden_layers"] - 1,
                    "norm": False,
                    "class_token": strategy == "full",
                },
                "vision_tokenizer": {"type": "mlp", "bias": config.get("multimodal_projector_bias", True)},
                "fusion": "language-stream",
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "language_model"],
            },
            places=lambda ours: renamer([*table, *language_model_table(ours)]),
            text_config=text,
            vision_config=clip_vision_config(vision, checkpoint.folder),
            first_added_id=media_id,
            optional_pattern=rf"{CLIP_UNNEEDED}|vision_encoder\.visual\.ln_post\.\w+",
        )


def language_model_table(config: VLMConfig) -> list[tuple[str, Any]]:
    """TargetsOf of a language model under `language_model`, whose tables hold the added tokens as rows of their own.

    Of tied tables a file keeps the embedding alone, whose rows are then those of both.
    """
    added = slice(config.first_added_id, config.first_added_id + len(config.added_tokens))
    is_tied = config.get_text_config(decoder=True).tie_word_embeddings

    def table(target: str, *ours: str) -> Any:
        return lambda match: [
            Target(target),
            *(Target(f"added_tokens.{name}.weight", source_rows=added) for name in ours),
        ]

    return [
        (
            rf"{_MODEL}language_model\.(?:model\.)?embed_tokens\.weight",
            table("lang_model.model.embed_tokens.weight", "embedding", *(["head"] if is_tied else [])),
        ),
        (r"(?:language_model\.)?lm_head\.weight", table("lang_model.lm_head.weight", *([] if is_tied else ["head"]))),
        (rf"{_MODEL}language_model\.(?:model\.)?(layers\..*|norm\..*)", r"lang_model.model.\1"),
    ]


#: What a configuration that says nothing means: CLIP ViT-L/14 at 336 pixels.
_CLIP_LARGE: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _name(vision: Mapping[str, Any]) -> str:
    """OpenCLIP's name of the tower, if it has one of these sizes."""
    sizes = (vision["hidden_size"], vision["num_hidden_layers"], vision["patch_size"], vision["image_size"])
    return {(1024, 24, 14, 336): "ViT-L-14-336", (1024, 24, 14, 224): "ViT-L-14"}.get(sizes, "clip-vision-transformer")


_PROJECTOR = r"(?:model\.)?mm_projector\."
_TOWER = r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?"
#: Towers by the name in `mm_vision_tower` -> OpenCLIP's.
_TOWERS = {
    "openai/clip-vit-large-patch14-336": ("ViT-L-14-336", "openai"),
    "openai/clip-vit-large-patch14": ("ViT-L-14", "openai"),
    "openai/clip-vit-base-patch16": ("ViT-B-16", "openai"),
    "openai/clip-vit-base-patch32": ("ViT-B-32", "openai"),
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": ("ViT-L-14", "laion2b_s32b_b82k"),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("ViT-H-14", "laion2b_s32b_b79k"),
}
#: Channels of the projection -> the language model that LLaVA-1.5 was published with.
_LANGUAGE_MODELS = {4096: "lmsys/vicuna-7b-v1.5", 5120: "lmsys/vicuna-13b-v1.5"}
#: What of the configuration is LLaVA's, and none of the language model's.
_OWN = re.compile(
    r"(un)?freeze_mm.*|image_.*|mm_.*|tokenizer_.*|tune_mm.*|use_mm_proj|architectures|auto_map|_name_or_path"
)


class OriginalLLaVA:
    """`model.mm_projector`, alone or in a language model that keeps its own names, with or without the tower.

    Where an image stands, the code has -200, which is no token: our `<image>` has a row that nothing reads.
    """

    name = "LLaVA (original)"
    source = "https://github.com/haotian-liu/LLaVA/blob/main/llava/model/llava_arch.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        return any(re.fullmatch(rf"{_PROJECTOR}(?:0\.)?weight", name) for name in checkpoint.tensors)

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        config = checkpoint.config
        if "model.image_newline" in checkpoint.tensors or config.get("image_aspect_ratio") == "anyres":
            raise CheckpointError(
                f"{checkpoint.name!r} cuts images into tiles, as LLaVA-1.6 does, and vlm gives each image to the "
                "vision encoder as a whole. LLaVA-1.5 can be read."
            )
        reading = _reading(checkpoint)
        vision, tower, notes = _vision(checkpoint)
        holds_lm = "model.norm.weight" in checkpoint.tensors
        text = {key: value for key, value in config.items() if not _OWN.fullmatch(key)}
        text["model_type"] = _type(checkpoint)
        lm = checkpoint.name if holds_lm else _language_model(checkpoint)
        if not holds_lm:
            notes.append(f"The language model is not in the files; taken is {lm or 'none'}, see --language-model.")
        if config.get("image_aspect_ratio") == "pad":
            notes.append(
                "It was trained on images that are padded to squares; OpenCLIP's tower cuts out the middle. Pad images "
                "that are far from square."
            )
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {**tower, **reading},
                "vision_tokenizer": _projector(checkpoint),
                "fusion": "language-stream",
                "language_model": {"name": lm or ""},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", *(["language_model"] if holds_lm else [])],
            },
            places=lambda ours: _original_places(checkpoint, ours, reading),
            text_config=text if holds_lm else None,
            vision_config=vision,
            optional_pattern=rf"{CLIP_UNNEEDED}|vision_encoder\.visual\.ln_post\.\w+|added_tokens\..*",
            notes=tuple(notes),
        )


def _reading(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    """Which features of the tower are projected; those of LLaVA-1.5 where nothing says it."""
    config = checkpoint.config
    layer, feature = config.get("mm_vision_select_layer", -2), config.get("mm_vision_select_feature", "patch")
    if not isinstance(layer, int) or layer >= 0 or feature not in ("patch", "cls_patch"):
        raise CheckpointError(
            f"{checkpoint.name!r} takes {feature!r} of layer {layer!r}; vlm takes the patches of one layer that is "
            "counted from the end, with or without the class token."
        )
    return {"layer": layer, "norm": False, "class_token": feature == "cls_patch"}


def _vision(checkpoint: PublishedCheckpoint) -> tuple[dict[str, Any] | None, dict[str, Any], list[str]]:
    """Configuration of a tower in the files, what a composition calls it, and notes."""
    named = checkpoint.config.get("mm_vision_tower")
    name, pretrained = _TOWERS.get(str(named), ("", None))
    if (shape := _shape(checkpoint, rf"{_TOWER}embeddings\.patch_embedding\.weight")) is not None:
        vision = _shapes_of_tower(checkpoint, shape, is_openai=not str(named).startswith("laion"))
        return clip_vision_config(vision, checkpoint.folder), {"name": name or _name(vision)}, []
    projection = _projection(checkpoint)
    if named is None and len(projection) == 2 and projection[0][1] == 1024:
        name, pretrained = _TOWERS["openai/clip-vit-large-patch14-336"]
        return None, {"name": name, "pretrained": pretrained}, [_GUESSED]
    note = f"The vision encoder {named!r} is not known; name OpenCLIP's." if named is not None and not name else None
    return None, {"name": name, "pretrained": pretrained}, [] if note is None else [note]


_GUESSED = (
    "The file does not name its vision encoder; by its shapes it is that of LLaVA-1.5, ViT-L-14-336:openai, layer -2."
)


def _shape(checkpoint: PublishedCheckpoint, pattern: str) -> tuple[int, ...] | None:
    found = (info.shape for name, info in checkpoint.tensors.items() if re.fullmatch(pattern, name))
    return next(found, None)


def _shapes_of_tower(checkpoint: PublishedCheckpoint, patch: tuple[int, ...], *, is_openai: bool) -> dict[str, Any]:
    """Transformers' configuration of a CLIP tower, of its shapes."""
    width, size = patch[0], patch[-1]
    positions = _shape(checkpoint, rf"{_TOWER}embeddings\.position_embedding\.weight")
    hidden = _shape(checkpoint, rf"{_TOWER}encoder\.layers\.0\.mlp\.fc1\.weight")
    if positions is None or hidden is None:
        raise CheckpointError(f"{checkpoint.name!r} has part of a vision tower. Is it complete?")
    return {
        "hidden_size": width,
        "intermediate_size": hidden[0],
        "num_hidden_layers": number_of(checkpoint, rf"{_TOWER}encoder\.layers\.(\d+)\."),
        # Every CLIP has heads of 64 channels, but for the larger ones of LAION.
        "num_attention_heads": 16 if width == 1280 else max(1, width // 64),
        "image_size": isqrt(positions[0] - 1) * size,
        "patch_size": size,
        "hidden_act": "quick_gelu" if is_openai else "gelu",
    }


def _projection(checkpoint: PublishedCheckpoint) -> list[tuple[int, ...]]:
    """Shapes of the projection's matrices, in order."""
    names = sorted(name for name in checkpoint.tensors if re.fullmatch(rf"{_PROJECTOR}(?:\d+\.)?weight", name))
    return [checkpoint.shape(name) for name in names]


def _projector(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    count = len(_projection(checkpoint))
    if count > 2:
        raise CheckpointError(f"{checkpoint.name!r} has a projection of {count} layers; vlm has those of 1 and 2.")
    return {"type": "linear" if count == 1 else "mlp"}


def _type(checkpoint: PublishedCheckpoint) -> str:
    """The language model's type: that of LLaVA's own configuration, which is named after it."""
    given = checkpoint.config.get("model_type", "llava")
    return {"llava": "llama"}.get(given, given.removeprefix("llava_"))


def _language_model(checkpoint: PublishedCheckpoint) -> str | None:
    projection = _projection(checkpoint)
    known = _LANGUAGE_MODELS.get(projection[-1][0]) if len(projection) == 2 else None
    return checkpoint.config.get("_name_or_path") or known


def _original_places(checkpoint: PublishedCheckpoint, config: VLMConfig, reading: Mapping[str, Any]) -> TargetsOf:
    """
    Raises:
        CheckpointError: if another tower was named, and features of it that the projection was not trained on.
    """
    found = config.composition.vision_encoder.feature_arguments
    if found != dict(reading):
        wrong = [name for name in reading if found[name] != reading[name]]
        flags = " ".join(f"--set vision_encoder.{name}={str(reading[name]).lower()}" for name in wrong)
        raise CheckpointError(
            f"{checkpoint.name!r} projects other features than those of "
            f"{' and '.join(f'{name}={found[name]}' for name in wrong)}. Add {flags}"
        )
    width = config.vision_config["vision_cfg"].get("width", 0)
    return renamer(
        [
            (rf"{_PROJECTOR}(weight|bias)", r"vision_tokenizer.proj.\1"),
            (rf"{_PROJECTOR}(\d+)\.(\w+)", r"vision_tokenizer.proj.\1.\2"),
            *clip_table(_TOWER, width),
            (r"(model\.(?:embed_tokens|layers|norm)\..*|lm_head\.weight)", r"lang_model.\1"),
        ]
    )
