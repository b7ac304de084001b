"""The repositories of the hub from which the parts of a composition come."""

from __future__ import annotations

from pathlib import Path

from vlm_cli.composition import Composition
from vlm_cli.composition.options import SeveralEncoderOptions, VisionEncoderOptions
from vlm_cli.hub_ids import is_hub_id

__all__ = ["base_models"]


def base_models(composition: Composition) -> dict[str, str | None]:
    """Return each pretrained part, as a person would name it, and its repository; None if no repository is known."""
    encoder = composition.vision_encoder
    encoders = encoder.encoders if isinstance(encoder, SeveralEncoderOptions) else [encoder]
    found = {}
    for one in encoders:
        if (name := _name(one)) is not None:
            found[name] = _repository_of_encoder(one)
    name = composition.language_model.name
    found[name] = name if _is_repository(name) else None
    return found


def _is_repository(name: str) -> bool:
    return is_hub_id(name) and not Path(name).exists() and not name.endswith(".gguf")


def _name(encoder: VisionEncoderOptions) -> str | None:
    """Return the name of an encoder with its weights; None if it has none."""
    if encoder.name.partition(":")[0] in ("hf", "timm", "hf-hub", "local-dir"):
        return encoder.name
    return None if encoder.pretrained is None else f"{encoder.name}:{encoder.pretrained}"


def _repository_of_encoder(encoder: VisionEncoderOptions) -> str | None:
    kind, colon, place = encoder.name.partition(":")
    if colon and kind == "timm":
        return f"timm/{place}" if is_hub_id(f"timm/{place}") else None
    if colon:
        return place if kind in ("hf", "hf-hub") and _is_repository(place) else None
    from open_clip.pretrained import get_pretrained_cfg

    place = get_pretrained_cfg(encoder.name, encoder.pretrained or "").get("hf_hub") or ""
    return place.rstrip("/") if _is_repository(place.rstrip("/")) else None
