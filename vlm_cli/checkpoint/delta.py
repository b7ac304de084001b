"""Delta directories: a model without the tensors that its pretrained parts (its backbones) hold already.

For each part whose tensors were left out, `config.json` says under `backbones` where they are, at which commit, and
their hash. `delta.safetensors` holds all other tensors. Loading fails if a tensor is in neither, or a hash differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from vlm_cli.checkpoint.adapters import attach_adapters
from vlm_cli.checkpoint.backbones import (
    Backbone,
    BackbonePlaces,
    advice,
    blaming,
    hash_tensors,
    locate_language_model,
    locate_tower,
    pin_language_model,
    pin_tower,
)
from vlm_cli.checkpoint.create import cast, put_together
from vlm_cli.checkpoint.full import load_full
from vlm_cli.checkpoint.inside import check_folder, read_index
from vlm_cli.checkpoint.parts.language_models import find_language_model
from vlm_cli.checkpoint.parts.tower import SeveralWeights
from vlm_cli.checkpoint.parts.vision_encoders import find_tower, load_tower
from vlm_cli.checkpoint.size_limits import limited_size, weight_files
from vlm_cli.composition import SeveralEncoderOptions
from vlm_cli.errors import CheckpointError, UsageError, VLMError, first_line
from vlm_cli.modeling.adapters import adapter_parameters, plain_tensors
from vlm_cli.modeling.config import VLMConfig, stored_dtype
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of

__all__ = [
    "DELTA_FILE",
    "PREFIXES",
    "assemble",
    "count_delta_bytes",
    "delta_names",
    "own_tensors",
    "write_delta",
    "write_files",
]

DELTA_FILE = "delta.safetensors"  # Transformers loads no file of this name, so it cannot leave the other tensors random

#: Part that can be pretrained -> how the names of its tensors begin.
PREFIXES = {
    "vision_encoder": f"{VLM.PART_PREFIXES['vision_encoder']}visual.",
    "language_model": VLM.PART_PREFIXES["language_model"],
}


def count_delta_bytes(model: VLM, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of the tensors in a delta directory of this model after training. The model may be on meta."""
    parts = model.config.composition
    encoder = parts.vision_encoder
    named = encoder.pretrained is not None or encoder.name.startswith(("hf:", "timm:", "hf-hub:", "local-dir:"))
    named = named and not isinstance(encoder, SeveralEncoderOptions)
    frozen = [part for part in PREFIXES if part not in parts.trainable and (part == "language_model" or named)]
    left_out = tuple(PREFIXES[part] for part in frozen)
    held = [x for name, x in own_tensors(model).items() if not (left_out and name.startswith(left_out))]
    held += [x for _, x in adapter_parameters(model)]
    return sum(x.numel() * (dtype if dtype and x.is_floating_point() else x.dtype).itemsize for x in held)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a file of the model holds, adapters aside: tied ones once, under their first name."""
    names: dict[int, str] = {}
    state = plain_tensors(model)
    for name, x in state.items():
        names.setdefault(id(x), name)
    return {name: state[name] for name in names.values()}


# -- writing -----------------------------------------------------------------------------------------------------------


def write_delta(
    model: VLM,
    out: Path,
    *,
    unchanged: Collection[str] = (),
    trust_remote_code: bool = False,
    max_shard_size: str = "5GB",
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Write `delta.safetensors`, `config.json` and `generation_config.json` into `out`.

    Each pretrained part is loaded again and compared tensor by tensor, so that the delta keeps every tensor that was
    trained or replaced.

    Args:
        model: the model.
        out: an existing directory.
        unchanged: parts that hold exactly their pretrained weights; they are not loaded again.
        trust_remote_code: whether the language model's own code may run.
        max_shard_size: largest size of one weight file, such as "5GB".
        progress: called with the name of each step before it begins.

    Returns:
        The pinned pretrained parts, and the numbers of tensors and bytes that were written and left out.

    Raises:
        UsageError: if no tensor can be left out.
        CheckpointError: if a pretrained part cannot be found.
    """
    held = own_tensors(model)
    pinned: dict[str, Backbone] = {}
    for part, prefix in PREFIXES.items():
        if part not in unchanged:
            progress(f"comparing with the pretrained {part.replace('_', ' ')}")
        try:
            found = _pin(model, part, trust_remote_code, load=part not in unchanged)
        except VLMError as error:
            raise CheckpointError(
                f"{error} To leave out what it holds, a delta needs the pretrained {part.replace('_', ' ')} at hand; "
                "run the command where it is found, or write a full directory, as for a published checkpoint (build "
                "--from) that brought its own."
            ) from None
        if found is None:
            continue
        backbone, pretrained = found
        same = {
            name: x
            for name, x in held.items()
            if name.startswith(prefix)
            and (pretrained is None or _is_equal(x, pretrained.get(name.removeprefix(prefix))))
        }
        if same:
            size = sum(x.nbytes for x in same.values())
            pinned[part] = replace(backbone, sha256=hash_tensors(same.items()), tensors=len(same), bytes=size)
            held = {name: x for name, x in held.items() if name not in same}
    if not pinned:
        raise UsageError(
            "no tensor of this model equals that of a pretrained part, so a delta directory would hold all of it. "
            "Write a full one."
        )
    progress("writing what differs")
    return write_files(model, out, held, pinned, max_shard_size)


def write_files(
    model: VLM, out: Path, held: Mapping[str, Tensor], pinned: Mapping[str, Backbone], max_shard_size: str
) -> dict[str, Any]:
    """Write the files of a delta.

    Args:
        model: the model.
        out: an existing directory.
        held: the tensors that `delta.safetensors` gets.
        pinned: part -> where the others are.
        max_shard_size: largest size of one weight file, such as "5GB".

    Returns:
        As of `write_delta`.
    """
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        {name: x.detach() for name, x in held.items()},
        out,
        filename_pattern=DELTA_FILE.replace(".", "{suffix}."),
        max_shard_size=max_shard_size,
    )
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.backbones = {part: asdict(backbone) for part, backbone in pinned.items()}
    try:
        model.config.save_pretrained(out)
    finally:
        del model.config.backbones
    model.generation_config.save_pretrained(out)
    return {
        "backbones": {part: asdict(replace(backbone, model_config=None)) for part, backbone in pinned.items()},
        "tensors": len(held),
        "tensor_bytes": sum(x.nbytes for x in held.values()),
        "bytes_left_out": sum(backbone.bytes for backbone in pinned.values()),
    }


def _is_equal(x: Tensor, pretrained: Tensor | None) -> bool:
    """Tell whether a tensor of the model equals the pretrained tensor to the last bit, in the model's dtype."""
    if pretrained is None or x.shape != pretrained.shape:
        return False
    return torch.equal(x, pretrained.to(x) if x.is_floating_point() else pretrained)


def _pin(
    model: VLM, part: str, trust_remote_code: bool, *, load: bool
) -> tuple[Backbone, Mapping[str, Tensor] | None] | None:
    """Find out where a pretrained part is, and read its tensors if `load`; None if the composition names no weights."""
    if part == "language_model":
        source = find_language_model(model.config.composition.language_model, trust_remote_code=trust_remote_code)
        return pin_language_model(source), source.load(model.dtype).state_dict() if load else None
    encoder = model.config.composition.vision_encoder
    tower = find_tower(encoder)
    if tower.weights is None or isinstance(tower.weights, SeveralWeights):  # a record has one location
        return None
    backbone, tower = pin_tower(encoder.name, tower)
    return backbone, load_tower(tower).state_dict() if load else None


def delta_names(name: str, **keywords: Any) -> set[str]:
    """Return the names of the tensors that a delta directory itself holds."""
    return set(_read(name, keywords))


def _delta_files(name: str) -> list[Path]:
    """List the weight files in a delta directory; empty for a hub id."""
    return [file for file in weight_files(name) if file.name.startswith(Path(DELTA_FILE).stem)]


# -- loading -----------------------------------------------------------------------------------------------------------


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
    backbones = _read_backbones(name, config, places)
    held = _read(name, keywords)
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


def _read_backbones(name: str, config: VLMConfig, places: BackbonePlaces) -> dict[str, Backbone]:
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
        where = {"location": found[moved].location, "revision": found[moved].revision}
        found = {part: replace(x, **where) for part, x in models.items()}
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


def _read(name: str, keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of a delta directory.

    Raises:
        CheckpointError: if they cannot be read.
    """
    from safetensors.torch import load_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    try:
        index = cached_file(name, f"{DELTA_FILE}.index.json", **optional, **keywords)
        shards = {DELTA_FILE} if index is None else set(read_index(Path(index)).values())
        held: dict[str, Tensor] = {}
        for shard in sorted(shards):
            file = cached_file(name, shard, **keywords)
            assert file is not None  # a file that is missing raises
            held |= load_file(file)
        return held
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot load the delta in {name!r}: {first_line(error)}.") from None
