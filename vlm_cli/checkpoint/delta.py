"""Delta directories: a model without the tensors that its pinned backbones hold already.

`config.json` says under `backbones`, for each part whose tensors were left out, where they are, at which commit, and
their hash. `delta.safetensors` has all others. Nothing is left to chance: a tensor comes from one or the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from vlm_cli.checkpoint.create import cast
from vlm_cli.checkpoint.parts.language_models import LanguageModelSource, find_language_model
from vlm_cli.checkpoint.parts.openclip import Tower, fetch_weights, find_tower, load_tower, weights_in
from vlm_cli.composition import LanguageModelOptions
from vlm_cli.errors import CheckpointError, UsageError, VLMError, first_line
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.towers import build_tower
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.modeling.vlm import VLM

__all__ = ["DELTA_FILE", "Backbone", "assemble", "delta_bytes", "hash_tensors", "write_delta"]

DELTA_FILE = "delta.safetensors"  # Transformers loads no file of this name, so it cannot leave the other tensors random

#: Names of the tensors of the parts that can be pretrained.
PREFIXES = {
    "vision_encoder": f"{VLM.PART_PREFIXES['vision_encoder']}visual.",
    "language_model": VLM.PART_PREFIXES["language_model"],
}


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Where the tensors are that a delta directory leaves out of a part.

    Attributes:
        kind: a repository of the hub, a file or directory, an address, or a package that has an encoder of its own.
        name: in the composition.
        location: repository, absolute path or address.
        revision: commit of the repository.
        file: in the repository or directory, where one file is meant.
        model_config: OpenCLIP's configuration of the whole model, for files in other layouts than its own.
        sha256: of the tensors that were left out, see `hash_tensors`.
        tensors: how many were left out.
        bytes: what they take.
    """

    kind: Literal["hub", "path", "url", "package"]
    name: str
    location: str
    revision: str | None = None
    file: str | None = None
    model_config: dict[str, Any] | None = None
    sha256: str = ""
    tensors: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        at = f" at commit {self.revision}" if self.revision else ""
        return f"{self.location!r}{at}{f' ({self.file})' if self.file else ''}"


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names; one tensor is in memory at a time.

    >>> hash_tensors([("b", torch.ones(2)), ("a", torch.zeros(1))])[:8]
    '9ca35ed8'
    """
    digest = hashlib.sha256()
    for name, x in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}\n".encode())
        digest.update(memoryview(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def delta_bytes(model: VLM, dtype: torch.dtype | None = None) -> int:
    """Bytes of the tensors that a delta directory of a model holds once what trains has trained; on any device."""
    parts = model.config.composition
    encoder = parts.vision_encoder
    named = encoder.pretrained is not None or encoder.name.startswith(("hf-hub:", "local-dir:"))
    frozen = [part for part in PREFIXES if part not in parts.trainable and (part == "language_model" or named)]
    left_out = tuple(PREFIXES[part] for part in frozen)
    held = {name: x for name, x in _tensors(model).items() if not (left_out and name.startswith(left_out))}
    return sum(x.numel() * (dtype if dtype and x.is_floating_point() else x.dtype).itemsize for x in held.values())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is saved of a model; tied weights once, under the first of their names."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
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
    from huggingface_hub import save_torch_state_dict

    held = _tensors(model)
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
            "no tensor of this model is that of a pretrained part it was composed with, so a delta directory would "
            "hold all of it. Write a full one."
        )
    progress("writing what differs")
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
        return _language_backbone(source), source.load(model.dtype).state_dict() if load else None
    tower = find_tower(model.config.composition.vision_encoder)
    if tower.weights is None:
        return None
    backbone, tower = _vision_backbone(model.config.composition.vision_encoder.name, tower)
    return backbone, load_tower(tower).state_dict() if load else None


def _language_backbone(source: LanguageModelSource) -> Backbone:
    path, file = Path(source.location), source.keywords.get("gguf_file")
    if path.exists():
        return Backbone(kind="path", name=source.name, location=str(path.resolve()), file=file)
    revision = source.keywords.get("revision")
    found = _in_cache(Path(cached_file(source.location, file or "config.json", revision=revision)))
    commit = revision if found is None else found[1]
    return Backbone(kind="hub", name=source.name, location=source.location, revision=commit, file=file)


def _vision_backbone(name: str, tower: Tower) -> tuple[Backbone, Tower]:
    """Where the weights of a tower are, and the tower with them fetched."""
    if isinstance(tower.weights, str):
        return Backbone(kind="package", name=name, location=tower.weights), tower
    path = fetch_weights(tower)
    tower, model_config = replace(tower, weights=path), dict(tower.model_config)
    if found := _in_cache(path):
        repository, revision, file = found
        return Backbone(
            kind="hub", name=name, location=repository, revision=revision, file=file, model_config=model_config
        ), tower
    url = tower.weights.get("url") if isinstance(tower.weights, dict) else None
    kind: Literal["url", "path"] = "url" if url else "path"
    return Backbone(kind=kind, name=name, location=url or str(path.resolve()), model_config=model_config), tower


def _in_cache(path: Path) -> tuple[str, str, str] | None:
    """Repository, commit and file of a path in the hub's cache: …/models--ORG--NAME/snapshots/COMMIT/FILE."""
    for folder in path.absolute().parents:
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            repository = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
            return repository, folder.name, str(path.absolute().relative_to(folder))
    return None


# -- loading -----------------------------------------------------------------------------------------------------------


def assemble(
    name: str,
    config: VLMConfig,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    moved: Mapping[str, str] | None = None,
    **keywords: Any,
) -> VLM:
    """The model of a delta directory: its backbones, and over them its own tensors.

    Args:
        name: directory or hub id.
        config: with `backbones`, which it loses.
        dtype: of the weights; "auto" is that of the files.
        trust_remote_code: run the language model's own code.
        moved: part -> where its pretrained weights are now, if they are not where the delta's config.json says.
        keywords: `revision`, `token`, … of the hub, for the directory itself.

    Raises:
        CheckpointError: if a backbone is not there, or is another one, or tensors are missing.
    """
    backbones = {part: Backbone(**record) for part, record in config.backbones.items()}
    del config.backbones
    for part, place in (moved or {}).items():
        if part not in backbones:
            raise CheckpointError(f"{name!r} has no backbone {part!r}. It has: {', '.join(backbones)}.")
        backbones[part] = _at(backbones[part], place)
    held = _read(name, keywords)
    stored = config.dtype or torch.float32
    with torch.random.fork_rng(devices=[]):  # new modules are drawn before they are filled
        try:
            visual = _visual(config, backbones.get("vision_encoder"))
            lm = _language_model(config, backbones.get("language_model"), stored, trust_remote_code)
        except _NotThere as problem:
            part = problem.part
            raise CheckpointError(_how_to_get(name, part, backbones[part], problem)) from None
        encoder = VisionEncoder(visual, **config.composition.vision_encoder.feature_arguments)
        model = VLM(config, vision_encoder=encoder, lang_model=lm)
    cast(model, stored)
    _fill(name, model, held, backbones)
    for part, backbone in backbones.items():
        mine = [(k, x) for k, x in _tensors(model).items() if k.startswith(PREFIXES[part]) and k not in held]
        if (found := hash_tensors(mine)) != backbone.sha256:
            raise CheckpointError(
                f"the {part.replace('_', ' ')} {backbone} is not the one that {name!r} was made with: the hash of its "
                f"{len(mine)} tensors is {found[:12]}…, expected {backbone.sha256[:12]}… of {backbone.tensors}. "
                f"{_elsewhere(part)}"
            )
    if dtype != "auto":
        cast(model, dtype)
        model.config.dtype = model.config.text_config.dtype = dtype
    return model


class _NotThere(Exception):
    """A backbone that could not be read."""

    def __init__(self, part: str, error: Exception) -> None:
        super().__init__(first_line(error))
        self.part = part


def _at(backbone: Backbone, place: str) -> Backbone:
    return replace(backbone, kind="path", location=str(Path(place).expanduser()), revision=None)


def _visual(config: VLMConfig, backbone: Backbone | None) -> nn.Module:
    if backbone is None:
        return build_tower(config.vision_config)
    try:
        return load_tower(_tower(config, backbone))
    except Exception as error:
        raise _NotThere("vision_encoder", error) from None


def _tower(config: VLMConfig, backbone: Backbone) -> Tower:
    """
    Raises:
        Exception: if its weights are not to be had.
    """
    from huggingface_hub import hf_hub_download

    settings = {key: x for key, x in config.vision_config.items() if key not in ("num_patches", "dim")}
    tower = Tower(settings, backbone.model_config or {}, backbone.location)
    if backbone.kind == "package":
        return tower
    if backbone.kind == "hub":
        assert backbone.file is not None
        # A commit that is in the cache is taken from there, without asking the hub.
        return replace(
            tower, weights=Path(hf_hub_download(backbone.location, backbone.file, revision=backbone.revision))
        )
    if backbone.kind == "url":
        return replace(tower, weights=fetch_weights(replace(tower, weights={"url": backbone.location})))
    place = Path(backbone.location)
    path = place if place.is_file() else None
    if place.is_dir():
        path = place / backbone.file if backbone.file else weights_in(place)
    if path is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {backbone.location!r}")
    return replace(tower, weights=path)


def _language_model(
    config: VLMConfig, backbone: Backbone | None, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    if backbone is None:
        return AutoModelForCausalLM.from_config(config.text_config)
    name = backbone.location
    if backbone.file is not None:
        name = str(Path(name) / backbone.file)
    options = LanguageModelOptions(name=name, revision=backbone.revision)
    try:
        return find_language_model(options, trust_remote_code=trust_remote_code).load(dtype)
    except VLMError as error:
        raise _NotThere("language_model", error) from None


@torch.no_grad()
def _fill(name: str, model: VLM, held: Mapping[str, Tensor], backbones: Mapping[str, Backbone]) -> None:
    """
    Raises:
        CheckpointError: if a tensor comes from nowhere, or has no place or another shape.
    """
    ours = _tensors(model)
    prefixes = tuple(PREFIXES[part] for part in backbones)
    missing = [k for k in ours if k not in held and not k.startswith(prefixes)]
    wrong = [k for k, x in held.items() if k not in ours or ours[k].shape != x.shape]
    if missing or wrong:
        raise CheckpointError(
            f"the delta in {name!r} does not cover the model: {len(missing)} tensors are missing, and {len(wrong)} "
            f"have no place or another shape; e.g. {min(missing + wrong)}."
        )
    for key, x in held.items():
        ours[key].copy_(x)


def _read(name: str, keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """
    Raises:
        CheckpointError: if the tensors of a delta directory cannot be read.
    """
    from safetensors.torch import load_file

    optional = {"_raise_exceptions_for_missing_entries": False}
    try:
        index = cached_file(name, f"{DELTA_FILE}.index.json", **optional, **keywords)
        shards = {DELTA_FILE}
        if index is not None:
            shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        held: dict[str, Tensor] = {}
        for shard in sorted(shards):
            held |= load_file(cached_file(name, shard, **keywords))
        return held
    except Exception as error:
        raise CheckpointError(f"cannot load the delta in {name!r}: {first_line(error)}.") from None


def _how_to_get(name: str, part: str, backbone: Backbone, problem: Exception) -> str:
    how = {
        "hub": f"Fetch it where there is a network (hf download {backbone.location} --revision {backbone.revision}), "
        "and copy the cache (HF_HOME).",
        "path": "Put it back there.",
        "url": f"Fetch {backbone.location} where there is a network.",
        "package": "Install the package that provides it.",
    }[backbone.kind]
    return (
        f"{name!r} leaves out the tensors of its {part.replace('_', ' ')}, which cannot be read from {backbone}: "
        f"{problem}. {how} {_elsewhere(part)}"
    )


def _elsewhere(part: str) -> str:
    return (
        f"If it is elsewhere, say where: vlm_cli.load(…, backbones={{{part!r}: PATH}}), or in config.json, under "
        "backbones, kind path and location PATH."
    )
