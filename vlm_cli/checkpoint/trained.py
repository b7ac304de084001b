"""Write what a run with adapters trained: a delta directory over the model that the run began with.

    OUT/delta.safetensors      the parts that trained whole, and other small parts
    OUT/adapters/PART/         the adapters, see adapters.py
    OUT/config.json            where the frozen tensors of the vision encoder and language model are, and their hash

If that model is a delta directory itself, OUT names the places at which its weights were found; otherwise OUT names the
model.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_cli.checkpoint.adapters import write_adapters
from vlm_cli.checkpoint.assembling import read_backbones
from vlm_cli.checkpoint.backbones import Backbone, BackbonePlaces, hash_tensors, pin_model
from vlm_cli.checkpoint.delta import PREFIXES, own_tensors, read_held, write_files
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.vlm import VLM
from vlm_cli.trust import load_pretrained

__all__ = ["write_trained"]


def write_trained(
    model: VLM,
    out: Path,
    base: str,
    *,
    changed: Collection[str] = (),
    backbones: Mapping[str, str] | None = None,
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Write the weights, their configurations and the adapters of a model into `out`.

    Args:
        model: with its adapters. Its frozen tensors are those of `base`.
        out: an existing directory.
        base: directory or hub id of the model that the run began with.
        changed: parts that do not hold the tensors of `base`, although they are frozen now.
        backbones: if `base` is a delta directory, part -> where its pretrained weights are now, if they moved.
        max_shard_size: largest size of one weight file, such as "5GB".

    Returns:
        As of `write_delta`, and the bytes of the adapters.
    """
    held = own_tensors(model)
    places, kept = _places(base, backbones or {})
    pinned = {}
    for part, place in places.items():
        if part in model.config.composition.trainable or part in changed:
            continue
        left_out = {name: x for name, x in held.items() if name.startswith(PREFIXES[part]) and name not in kept}
        size = sum(x.nbytes for x in left_out.values())
        pinned[part] = replace(place, sha256=hash_tensors(left_out.items()), tensors=len(left_out), bytes=size)
        held = {name: x for name, x in held.items() if name not in left_out}
    facts = write_files(model, out, held, pinned, max_shard_size)
    bases = {part: pinned[part].location if part in pinned else base for part in model.config.adapters}
    return {**facts, "adapter_bytes": write_adapters(model, out, bases)}


def _places(base: str, moved: Mapping[str, str]) -> tuple[dict[str, Backbone], Collection[str]]:
    """Return where the tensors of the pretrained parts are, and the names of those that `base` itself holds."""
    config = load_pretrained(VLMConfig, base)
    if not config.is_delta:
        model = pin_model(base)
        return dict.fromkeys(PREFIXES, model), ()
    found = read_backbones(base, config, BackbonePlaces(moved))
    for part, place in found.items():
        if place.kind in ("path", "model") and place.revision is None:  # a user may name a path from the current folder
            found[part] = replace(place, location=os.path.abspath(place.location))
    return found, read_held(base, {})
