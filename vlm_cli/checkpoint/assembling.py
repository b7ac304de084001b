"""Load the model of a delta directory: its backbones, its own tensors over them, and its adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_cli.checkpoint.adapters import attach_adapters
from vlm_cli.checkpoint.backbones import (
    Backbone,
    BackbonePlaces,
    advice,
    blaming,
    hash_tensors,
    locate_language_model,
    locate_tower,
)
from vlm_cli.checkpoint.create import cast, put_together
from vlm_cli.checkpoint.delta import DELTA_FILE, PREFIXES, own_tensors, read_held
from vlm_cli.checkpoint.full import load_full
from vlm_cli.checkpoint.inside import check_folder
from vlm_cli.checkpoint.parts.vision_encoders import load_tower
from vlm_cli.checkpoint.size_limits import limited_size, weight_files
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig, stored_dtype
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of

__all__ = ["assemble", "read_backbones"]


def assemble(
    name: str,
    config: VLMConfig,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    places: BackbonePlaces | None = None,
    **keywords: Any,
) -> VLM:
    """Make the model of a delta directory: load its backbones, and copy its own tensors over them.

    Args:
        name: directory or hub id.
        config: its configuration. `backbones` is removed from it.
        dtype: of the weights; "auto" keeps that of the files.
        trust_remote_code: whether the language model's own code may run.
        places: where the user says that pretrained weights are, and which hosts may be asked.
        keywords: `revision`, `token`, … of Transformers' `from_pretrained`, for the directory itself.

    Raises:
        CheckpointError: if a backbone cannot be read or is another one, or tensors are missing.
    """
    places = places or BackbonePlaces()
    backbones = read_backbones(name, config, places)
    held = read_held(name, keywords)
    stored = stored_dtype(config) or torch.float32
    base = next((x for x in backbones.values() if x.kind == "model"), None)
    with torch.random.fork_rng(devices=[]), ExitStack() as downloads:  # an error removes what was fetched
        if base is not None:
            model = _load_base(name, config, base, stored, trust_remote_code)
        else:
            model = _load_parts(name, config, backbones, stored, trust_remote_code, places, downloads)
        cast(model, stored)
        _fill(name, model, held, backbones)
        for part, backbone in backbones.items():
            _check_hash(name, model, part, backbone, held)
    attach_adapters(name, model, **keywords)
    model.set_trainable(config.composition.trainable)
    cast(model, stored)
    if dtype != "auto":
        assert isinstance(dtype, torch.dtype)
        cast(model, dtype)
        model.config.dtype = model.config.text_config.dtype = dtype
    return model


def _load_base(name: str, config: VLMConfig, base: Backbone, dtype: torch.dtype, trust_remote_code: bool) -> VLM:
    """Load the model that a run began with, as a model of the configuration of the run's output.

    Raises:
        CheckpointError: if it cannot be read.
    """
    adapters, config.adapters = config.adapters, None
    with blaming(name, "language_model", base):
        check_folder(Path(base.location))
        where = {} if base.revision is None else {"revision": base.revision}
        model = load_full(base.location, config, dtype, trust_remote_code, where)
    model.config.adapters = adapters
    return model


def _load_parts(
    name: str,
    config: VLMConfig,
    backbones: Mapping[str, Backbone],
    dtype: torch.dtype,
    trust_remote_code: bool,
    places: BackbonePlaces,
    downloads: ExitStack,
) -> VLM:
    """Load the pretrained parts of a delta directory, and make its model around them. Other tensors start at random.

    Raises:
        CheckpointError: if a part cannot be read.
    """
    vision, language = backbones.get("vision_encoder"), backbones.get("language_model")
    with blaming(name, "vision_encoder", vision):
        visual = load_tower(locate_tower(config, vision, places.hosts, downloads))
    lang_model = None
    if language is not None:
        with blaming(name, "language_model", language):
            lang_model = locate_language_model(language, trust_remote_code).load(dtype)
    with limited_size(repr(name), _delta_files(name)):
        return put_together(config, visual, lang_model)


def read_backbones(name: str, config: VLMConfig, places: BackbonePlaces) -> dict[str, Backbone]:
    """Take the records of backbones out of a configuration, and put the user's paths over them.

    Raises:
        CheckpointError: for a record that vlm does not follow, or a path of a part that has no record.
    """
    records = vars(config).pop("backbones", None) or {}
    if not isinstance(records, dict) or not records.keys() <= PREFIXES.keys():
        raise CheckpointError(f"config.json of {name!r} must hold under backbones any of: {', '.join(PREFIXES)}.")
    for part in places.paths:
        if part not in records:
            raise CheckpointError(f"{name!r} has no backbone {part!r}. It has: {', '.join(records)}.")
    found = {}
    for part, record in records.items():
        if part in places.paths and isinstance(record, dict):
            kind = "model" if record.get("kind") == "model" else "path"
            record = {**record, "kind": kind, "location": os.path.abspath(places.paths[part]), "revision": None}
        found[part] = Backbone.read(name, part, record)
        if part in places.paths:
            found[part] = found[part].relocated(places.paths[part])
    # What is one model for one part is that model for each part, wherever the user says that it is.
    if models := {part: x for part, x in found.items() if x.kind == "model"}:
        if len(models) < len(found) or len({records[part]["location"] for part in found}) > 1:
            raise CheckpointError(f"config.json of {name!r} must name one model under backbones, or none.")
        moved = next((part for part in places.paths), next(iter(models)))
        location, revision = found[moved].location, found[moved].revision
        found = {part: replace(x, location=location, revision=revision) for part, x in models.items()}
    return found


def _check_hash(name: str, model: VLM, part: str, backbone: Backbone, held: Mapping[str, Tensor]) -> None:
    """Check that a backbone holds the tensors that it held when the delta was written.

    Raises:
        CheckpointError: if it does not.
    """
    mine = [(k, x) for k, x in own_tensors(model).items() if k.startswith(PREFIXES[part]) and k not in held]
    found = hash_tensors(mine)
    if found != backbone.sha256:
        raise CheckpointError(
            f"the {part.replace('_', ' ')} {backbone} is not the one that {name!r} was made with: the hash of its "
            f"{len(mine)} tensors is {found[:12]}…, expected {backbone.sha256[:12]}… of {backbone.tensors}. "
            f"{advice(part)}"
        )


@torch.no_grad()
def _fill(name: str, model: VLM, held: Mapping[str, Tensor], backbones: Mapping[str, Backbone]) -> None:
    """Copy the delta's own tensors into a model whose backbones are loaded.

    Raises:
        CheckpointError: if a tensor is neither in the delta nor in a backbone, or the model has no such tensor.
    """
    ours = own_tensors(model)
    prefixes = tuple(PREFIXES[part] for part in backbones)
    missing = [k for k in ours if k not in held and not k.startswith(prefixes)]
    wrong = [k for k, x in held.items() if k not in ours or ours[k].shape != x.shape]
    if missing or wrong:
        raise CheckpointError(
            f"the delta in {name!r} does not cover the model: {count_of(len(missing), 'tensor')} missing, "
            f"{len(wrong)} unknown or of another shape; e.g. {min(missing + wrong)}."
        )
    for key, x in held.items():
        ours[key].copy_(x)


def _delta_files(name: str) -> list[Path]:
    """List the weight files in a delta directory; empty for a hub id."""
    return [file for file in weight_files(name) if file.name.startswith(Path(DELTA_FILE).stem)]
