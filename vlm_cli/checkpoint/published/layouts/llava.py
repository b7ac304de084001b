"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744), as Transformers writes it and as its authors do.

Sources: transformers/models/llava, `LlavaForConditionalGeneration`, with the names of releases before and after 4.52;
https://github.com/haotian-liu/LLaVA, `llava/model/llava_arch.py` and `llava/model/multimodal_encoder/clip_encoder.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import LlavaConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.preprocessing import PADS_TO_SQUARES, pads_to_squares, read_preprocessing
from vlm_cli.checkpoint.published.settings import Settings, check_settings_of
from vlm_cli.checkpoint.published.shapes import find_shape
from vlm_cli.checkpoint.published.tables import table_targets, tables_filled
from vlm_cli.checkpoint.published.targets import Rule, TargetsOf, make_targets_of
from vlm_cli.checkpoint.published.towers.clip import (
    CLIP_OPTIONAL,
    CLIP_SETTINGS,
    CLIP_TOWERS,
    convert_clip_config,
    make_clip_rules,
    name_clip_tower,
    read_clip_shapes,
)
from vlm_cli.checkpoint.published.towers.siglip import (
    SIGLIP_OPTIONAL,
    SIGLIP_PIXELS,
    SIGLIP_SETTINGS,
    convert_siglip_config,
    make_siglip_rules,
    name_siglip_tower,
)
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.schema import show

__all__ = ["HuggingFaceLLaVA", "OriginalLLaVA"]

_MODEL = r"(?:model\.)?"
#: LLaVA takes features before the vision encoder's last norm, so it does not need that norm.
_OPTIONAL = rf"{CLIP_OPTIONAL}|vision_encoder\.visual\.ln_post\.\w+"


class HuggingFaceLLaVA:
    """`vision_tower`, `multi_modal_projector` and `language_model`, with a `config.json` of type `llava`."""

    name = "LLaVA (Hugging Face)"
    source = "transformers/models/llava/modeling_llava.py"
    model_type = "llava"
    #: The module that reads pictures.
    tower = "vision_tower"
    #: Sentences that the user should read.
    notes: tuple[str, ...] = ()
    settings = Settings(
        config=LlavaConfig,
        read={
            *("vision_config", "text_config", "image_token_index", "image_token_id", "vision_feature_select_strategy"),
            *("vision_feature_layer", "multimodal_projector_bias"),
        },
        without_effect={"image_seq_length", "tie_word_embeddings", "ignore_index", "pad_token_id"},
        fixed={"projector_hidden_act": ("gelu",)},
    )

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projector's first matrix and the configuration's type."""
        return checkpoint.config.get("model_type") == self.model_type and any(
            name.endswith("multi_modal_projector.linear_1.weight") for name in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts, and its tokenizer has `<image>`."""
        config = checkpoint.config
        check_settings_of(checkpoint.name, "", config, self.settings)
        vision, text = config["vision_config"], dict(config["text_config"])
        text.setdefault("model_type", "llama")
        if (kind := vision.get("model_type", "clip_vision_model")) not in _TOWERS:
            raise CheckpointError(
                f"{checkpoint.name!r} has a vision encoder of type {kind!r}; vlm reads {' and '.join(_TOWERS)}."
            )
        check_settings_of(checkpoint.name, "vision_config", vision, _TOWERS[kind])
        is_clip = kind == "clip_vision_model"
        # Files of early releases lack what is the default of Transformers.
        vision = {**_TOWERS[kind].config().to_dict(), **vision}
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy not in ("default", "full"):
            raise CheckpointError(
                f"{checkpoint.name!r} takes features by strategy {show(strategy)}; vlm takes them with or without "
                "their class token."
            )
        if not is_clip and strategy == "default":
            raise CheckpointError(
                f"{checkpoint.name!r} has vision_feature_select_strategy='default', which drops the first patch of a "
                "SigLIP, as if it were a class token; vlm takes all patches."
            )
        prefix = rf"{_MODEL}{self.tower}\.(?:vision_model\.)?"
        make_rules = make_clip_rules if is_clip else make_siglip_rules
        media_id = config.get("image_token_index", config.get("image_token_id", 32000))
        rules: list[Rule] = [
            *make_rules(prefix, vision["hidden_size"]),
            (rf"{_MODEL}multi_modal_projector\.linear_1\.(\w+)", r"vision_tokenizer.proj.0.\1"),
            (rf"{_MODEL}multi_modal_projector\.linear_2\.(\w+)", r"vision_tokenizer.proj.2.\1"),
            (rf"{_MODEL}multi_modal_projector\.projector_layernorm\.(\w+)", r"vision_tokenizer.norm.\1"),
        ]
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {
                    "name": name_clip_tower(vision) if is_clip else name_siglip_tower(vision),
                    "layer": _count_from_end(checkpoint.name, self.read_layers(config), vision["num_hidden_layers"]),
                    "norm": False,
                    "class_token": is_clip and strategy == "full",
                },
                "vision_tokenizer": {"type": "mlp", **self.read_projector(config)},
                "fusion": "language-stream",
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "language_model"],
            },
            targets_for=lambda ours: make_targets_of([*rules, *_make_language_model_rules(checkpoint, ours)]),
            text_config=text,
            vision_config=_convert_tower(checkpoint, vision, prefix, is_clip),
            first_added_id=media_id,
            optional_pattern=_OPTIONAL if is_clip else rf"{SIGLIP_OPTIONAL}|vision_encoder\.visual\.trunk\.norm\.\w+",
            notes=(*self.notes, *((PADS_TO_SQUARES,) if pads_to_squares(checkpoint.folder) else ())),
        )

    def read_layers(self, config: Mapping[str, Any]) -> int | list[int]:
        """Return the layers whose features are projected, as Transformers counts them."""
        layers: int | list[int] = config.get("vision_feature_layer", -2)
        return layers

    def read_projector(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read the settings of the vision tokenizer."""
        return {"bias": config.get("multimodal_projector_bias", True)}


def _count_from_end(name: str, layers: int | list[int], depth: int) -> int | list[int]:
    """Count layers from the end. Transformers counts from the end (-1, -2, …) or from the embeddings (0, 1, …).

    Raises:
        CheckpointError: for the embeddings, or a layer that the vision encoder does not have.
    """
    found = [layer if layer < 0 else layer - depth - 1 for layer in ([layers] if isinstance(layers, int) else layers)]
    if not all(-depth <= layer < 0 for layer in found):
        raise CheckpointError(
            f"{name!r} takes features of layers {show(layers)}; its vision encoder has layers 1 to {depth}, or "
            f"-{depth} to -1."
        )
    return found[0] if isinstance(layers, int) else found


def _convert_tower(
    checkpoint: PublishedCheckpoint, vision: Mapping[str, Any], prefix: str, is_clip: bool
) -> dict[str, Any]:
    """Turn the configuration of a CLIP or a SigLIP into OpenCLIP's.

    Raises:
        CheckpointError: for a setting that OpenCLIP's tower does not have.
    """
    if is_clip:
        return convert_clip_config(vision, checkpoint.folder)
    preprocess = read_preprocessing(checkpoint.folder, vision["image_size"], resize_mode="squash", like=SIGLIP_PIXELS)
    has_head = find_shape(checkpoint, rf"{prefix}head\.probe") is not None
    return {**convert_siglip_config(vision, has_head=has_head), "preprocess": preprocess}


_HF_EMBEDDING = rf"{_MODEL}language_model\.(?:model\.)?embed_tokens\.weight"
_HF_HEAD = r"(?:language_model\.)?lm_head\.weight"


def _make_language_model_rules(checkpoint: PublishedCheckpoint, config: VLMConfig) -> list[Rule]:
    """Make the rules for a language model under `language_model`, whose tables have a row for each added token."""
    added = slice(config.first_added_id, config.first_added_id + len(config.added_tokens))
    filled = tables_filled(checkpoint, config, embedding=_HF_EMBEDDING, head=_HF_HEAD)
    return [
        (
            _HF_EMBEDDING,
            lambda _: table_targets("lang_model.model.embed_tokens.weight", filled["embedding"], added=added),
        ),
        (_HF_HEAD, lambda _: table_targets("lang_model.lm_head.weight", filled["head"], added=added)),
        (rf"{_MODEL}language_model\.(?:model\.)?(layers\..*|norm\..*)", r"lang_model.model.\1"),
    ]


#: Type of a vision encoder -> what becomes of its settings.
_TOWERS = {"clip_vision_model": CLIP_SETTINGS, "siglip_vision_model": SIGLIP_SETTINGS}


_PROJECTOR = r"(?:model\.)?mm_projector\."
_TOWER = r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?"
#: Channels of the projection -> the language model that LLaVA-1.5 was published with.
_LANGUAGE_MODELS = {4096: "lmsys/vicuna-7b-v1.5", 5120: "lmsys/vicuna-13b-v1.5"}
#: Settings in `config.json` that belong to LLaVA; the others are the language model's.
_OWN = re.compile(
    r"(un)?freeze_mm.*|image_.*|mm_.*|tokenizer_.*|tune_mm.*|use_mm_proj|architectures|auto_map|_name_or_path"
)


class OriginalLLaVA:
    """`model.mm_projector`, alone or in a language model that keeps its own names, with or without the tower.

    LLaVA's code marks an image by the id -200, which is no token. Here `<image>` has a row, which nothing reads.
    """

    name = "LLaVA (original)"
    source = "https://github.com/haotian-liu/LLaVA/blob/main/llava/model/llava_arch.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projector's first matrix."""
        return any(re.fullmatch(rf"{_PROJECTOR}(?:0\.)?weight", name) for name in checkpoint.tensors)

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Find out which parts the files hold; the others are known by name, or by the projector's shapes."""
        config = checkpoint.config
        if "model.image_newline" in checkpoint.tensors or config.get("image_aspect_ratio") == "anyres":
            raise CheckpointError(
                f"{checkpoint.name!r} cuts images into tiles, as LLaVA-1.6 does; vlm gives each image to the vision "
                "encoder as a whole. Give a checkpoint of LLaVA-1.5."
            )
        _check_original(checkpoint)
        features = _read_feature_settings(checkpoint)
        vision, tower, notes = _find_tower(checkpoint)
        holds_lm = "model.norm.weight" in checkpoint.tensors
        text = {key: value for key, value in config.items() if not _OWN.fullmatch(key)}
        text["model_type"] = _read_model_type(checkpoint)
        lm = checkpoint.name if holds_lm else _guess_language_model(checkpoint)
        if not holds_lm:
            notes.append(
                f"The files do not hold the language model. vlm takes {lm or 'none'}; name another with "
                "--language-model."
            )
        if config.get("image_aspect_ratio") == "pad":
            notes.append(PADS_TO_SQUARES)
        return CheckpointDescription(
            composition={
                "family": "llava",
                "vision_encoder": {**tower, **features},
                "vision_tokenizer": _read_projector(checkpoint),
                "fusion": "language-stream",
                "language_model": {"name": lm or ""},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", *(["language_model"] if holds_lm else [])],
            },
            targets_for=lambda ours: _make_original_targets(checkpoint, ours, features),
            text_config=text if holds_lm else None,
            vision_config=vision,
            crops_down=True,
            optional_pattern=rf"{_OPTIONAL}|added_tokens\..*",
            notes=tuple(notes),
        )


#: LLaVA's settings that decide how images are projected and where they stand -> what vlm builds.
_ORIGINAL = {
    "mm_projector_type": ("linear", "mlp2x_gelu"),
    "mm_use_im_start_end": (False,),
    "mm_patch_merge_type": ("flat",),
    "image_aspect_ratio": ("square", "pad", None),
    "mm_resampler_type": (None,),
}


def _check_original(checkpoint: PublishedCheckpoint) -> None:
    """Refuse settings that vlm cannot build.

    Raises:
        CheckpointError: naming the setting.
    """
    for name, possible in _ORIGINAL.items():
        if (given := checkpoint.config.get(name, possible[0])) not in possible:
            raise CheckpointError(
                f"{checkpoint.name!r} has {name}={show(given)}; vlm builds only {' or '.join(map(show, possible))}."
            )


def _read_feature_settings(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    """Read which features of the vision encoder are projected; LLaVA-1.5's if the configuration does not say.

    Raises:
        CheckpointError: for features that vlm does not have.
    """
    config = checkpoint.config
    layer, feature = config.get("mm_vision_select_layer", -2), config.get("mm_vision_select_feature", "patch")
    if not isinstance(layer, int) or layer >= 0 or feature not in ("patch", "cls_patch"):
        raise CheckpointError(
            f"{checkpoint.name!r} takes {feature!r} of layer {layer!r}; vlm takes patches of a single layer, counted "
            "from the end (-1, -2, …), with or without the class token."
        )
    return {"layer": layer, "norm": False, "class_token": feature == "cls_patch"}


def _find_tower(checkpoint: PublishedCheckpoint) -> tuple[dict[str, Any] | None, dict[str, Any], list[str]]:
    """Find the vision encoder.

    Returns:
        OpenCLIP's configuration of a tower in the files, or None; settings of `composition["vision_encoder"]`; notes.
    """
    named = checkpoint.config.get("mm_vision_tower")
    name, pretrained = CLIP_TOWERS.get(str(named), ("", None))
    if (vision := read_clip_shapes(checkpoint, _TOWER, named)) is not None:
        return convert_clip_config(vision, checkpoint.folder), {"name": name or name_clip_tower(vision)}, []
    projection = _find_projection(checkpoint)
    if named is None and len(projection) == 2 and projection[0][1] == 1024:
        name, pretrained = CLIP_TOWERS["openai/clip-vit-large-patch14-336"]
        return None, {"name": name, "pretrained": pretrained}, [_GUESSED]
    notes = []
    if named is not None and not name:
        notes.append(f"vlm does not know the vision encoder {named!r}. Give OpenCLIP's name: --vision-encoder NAME:TAG")
    return None, {"name": name, "pretrained": pretrained}, notes


_GUESSED = "The file does not name its vision encoder. By its shapes it is LLaVA-1.5's: ViT-L-14-336:openai, layer -2."


def _find_projection(checkpoint: PublishedCheckpoint) -> list[tuple[int, ...]]:
    """Return the shapes of the projection's matrices, in order."""
    names = sorted(name for name in checkpoint.tensors if re.fullmatch(rf"{_PROJECTOR}(?:\d+\.)?weight", name))
    return [checkpoint.shape(name) for name in names]


def _read_projector(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    """Read the settings of the vision tokenizer.

    Raises:
        CheckpointError: if the projection has more than two layers.
    """
    count = len(_find_projection(checkpoint))
    if count > 2:
        raise CheckpointError(
            f"{checkpoint.name!r} has a projection of {count} layers; vlm has projections of 1 and 2 layers."
        )
    return {"type": "linear" if count == 1 else "mlp"}


def _read_model_type(checkpoint: PublishedCheckpoint) -> str:
    """Return the language model's type; LLaVA names its own types after it: `llava_mistral`."""
    given = checkpoint.config.get("model_type", "llava")
    return {"llava": "llama"}.get(given, given.removeprefix("llava_"))


def _guess_language_model(checkpoint: PublishedCheckpoint) -> str | None:
    """Return the language model that the configuration names, or that LLaVA-1.5 had with such a projection."""
    projection = _find_projection(checkpoint)
    known = _LANGUAGE_MODELS.get(projection[-1][0]) if len(projection) == 2 else None
    return checkpoint.config.get("_name_or_path") or known


def _make_original_targets(
    checkpoint: PublishedCheckpoint, config: VLMConfig, features: Mapping[str, Any]
) -> TargetsOf:
    """Make the lookup of targets.

    Args:
        checkpoint: named in errors.
        config: of the VLM.
        features: the features that the projection was trained on.

    Raises:
        CheckpointError: if the composition takes other features of its vision encoder.
    """
    found = config.composition.vision_encoder.feature_arguments
    if found != dict(features):
        wrong = [name for name in features if found[name] != features[name]]
        flags = " ".join(f"--set vision_encoder.{name}={str(features[name]).lower()}" for name in wrong)
        raise CheckpointError(
            f"{checkpoint.name!r} was trained on other features than "
            f"{' and '.join(f'{name}={found[name]}' for name in wrong)}. Add {flags}"
        )
    width = config.vision_config["vision_cfg"].get("width", 0)
    return make_targets_of(
        [
            (rf"{_PROJECTOR}(weight|bias)", r"vision_tokenizer.proj.\1"),
            (rf"{_PROJECTOR}(\d+)\.(\w+)", r"vision_tokenizer.proj.\1.\2"),
            *make_clip_rules(_TOWER, width),
            (r"(model\.(?:embed_tokens|layers|norm)\..*|lm_head\.weight)", r"lang_model.\1"),
        ]
    )
