"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744), as its authors write it.

Source: https://github.com/haotian-liu/LLaVA, `llava/model/llava_arch.py` and
`llava/model/multimodal_encoder/clip_encoder.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.llava import OPTIONAL
from vlm_cli.checkpoint.published.preprocessing import PADS_TO_SQUARES
from vlm_cli.checkpoint.published.targets import TargetsOf, make_targets_of
from vlm_cli.checkpoint.published.towers.clip import (
    CLIP_TOWERS,
    convert_clip_config,
    make_clip_rules,
    name_clip_tower,
    read_clip_shapes,
)
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.schema import show

__all__ = ["OriginalLLaVA"]

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
            optional_pattern=rf"{OPTIONAL}|added_tokens\..*",
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
