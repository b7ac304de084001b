"""Backbones: the pretrained vision encoder and language model of a delta directory, pinned and found again.

pinning, when a delta is written      a part -> where its weights are, at which commit
locating, when a delta is loaded      that record -> a tower or language model to load

The record comes with the delta, and maybe from a stranger. It may name a commit of a hub repository, an address that
OpenCLIP's own table of pretrained weights has too, and a weight file or directory on this machine: such a path is what
the user's own `vlm build` wrote. Nothing of such a file is shown, and its tensors must have the recorded hash. Every
other address needs `--allow-host`, and every other path `--backbone`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers.utils.hub import cached_file

from vlm_cli.checkpoint.downloads import downloaded
from vlm_cli.checkpoint.inside import resolve_inside
from vlm_cli.checkpoint.parts.language_models import LanguageModelSource, find_language_model
from vlm_cli.checkpoint.parts.openclip import fetch_weights, published_address, weights_in
from vlm_cli.checkpoint.parts.tower import OutsideWeights, PublishedWeights, RepositoryWeights, Tower, WeightsFile
from vlm_cli.composition import LanguageModelOptions
from vlm_cli.errors import CheckpointError, first_line
from vlm_cli.hub_ids import is_hub_id
from vlm_cli.lookalike import find_named
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.offline import use_cache_without_network
from vlm_cli.registry import ENCODER_TYPES

__all__ = [
    "Backbone",
    "BackboneMissing",
    "BackbonePlaces",
    "blaming",
    "hash_sorted",
    "hash_tensors",
    "locate_language_model",
    "locate_tower",
    "pin_language_model",
    "pin_model",
    "pin_tower",
]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Where the tensors are that a delta directory leaves out of a part. config.json holds the fields.

    Attributes:
        kind: a repository of the hub, a file or directory, an address, a package that has an encoder of its own, or
            another model of vlm (with a revision, on the hub) that has the part.
        name: the part's name in the composition.
        location: repository, absolute path or address.
        revision: commit of the repository.
        file: file in the repository or directory, where one file holds all tensors.
        model_config: OpenCLIP's configuration of the whole model, which files of other projects need.
        sha256: hash of the tensors that were left out, see `hash_tensors`.
        tensors: number of tensors that were left out.
        bytes: their size.
    """

    kind: Literal["hub", "path", "url", "package", "model"]
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

    @classmethod
    def read(cls, directory: str, part: str, record: Any) -> Backbone:
        """Check a record of config.json, and return it as a backbone.

        Args:
            directory: what messages call the delta directory.
            part: name of the part.
            record: as config.json holds it.

        Raises:
            CheckpointError: naming the key, what it holds and what it may hold.
        """
        problem = _find_problem(record)
        if problem is not None:
            raise CheckpointError(
                f"config.json of {directory!r} has a record of the {part.replace('_', ' ')} that vlm does not follow: "
                f"{problem}. {advice(part)}"
            )
        return cls(**record)

    def relocated(self, path: str) -> Backbone:
        """Return the same backbone in another file or directory."""
        kind: Literal["path", "model"] = "model" if self.kind == "model" else "path"
        return replace(self, kind=kind, location=str(find_named(path)), revision=None)


@dataclass(frozen=True)
class BackbonePlaces:
    """What the user says of where backbones are.

    Attributes:
        paths: part -> file or directory.
        hosts: hosts that may be asked.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    hosts: frozenset[str] = frozenset()


#: Names and commits as the hub has them.
_COMMIT = re.compile("[0-9a-f]{40}")
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("kind", "name", "location", "sha256"), str),
    **dict.fromkeys(("revision", "file"), (str, type(None))),
    "model_config": (dict, type(None)),
    **dict.fromkeys(("tensors", "bytes"), int),
}


def _find_problem(record: Any) -> str | None:
    """Return what is wrong with a record of a backbone; None if vlm may follow it."""
    if not isinstance(record, dict):
        return "it is no object"
    keys = {x.name for x in fields(Backbone)}
    if wrong := sorted((record.keys() - keys) | ({"kind", "name", "location"} - record.keys())):
        return f"{wrong[0]!r} is {'unknown' if wrong[0] in record else 'missing'}"
    if wrong := [key for key, x in record.items() if not isinstance(x, _TYPES[key])]:
        return f"{wrong[0]!r} is {str(record[wrong[0]])[:40]!r}"
    if min(record.get("tensors", 0), record.get("bytes", 0)) < 0:
        return "its numbers are negative"
    kind, location = record["kind"], record["location"]
    if kind == "hub" or (kind == "model" and record.get("revision") is not None):
        if not is_hub_id(location):
            return f"location {location[:80]!r} is no id of a hub repository (ORG/NAME)"
        if not _COMMIT.fullmatch(record.get("revision") or ""):
            return "revision is no commit of 40 hexadecimal digits"
        return None
    if kind in ("path", "model"):
        # Two slashes name another machine on Windows; files of /proc and /dev are no weights.
        is_local = os.path.isabs(location) and not location.startswith(("//", "\\\\"))
        is_special = Path(os.path.realpath(location)).is_relative_to("/proc") or location.startswith(("/dev/", "/sys/"))
        return None if is_local and not is_special else f"location {location[:80]!r} is no absolute path of a file"
    if kind == "package":
        return f"location {location[:80]!r} is an address" if re.match(r"\w+:", location) else None
    return None if kind == "url" else f"kind {kind[:40]!r} is none of hub, path, url, package, model"


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes in the order of the names.

    >>> hash_tensors([("b", torch.ones(2)), ("a", torch.zeros(1))])[:8]
    '9ca35ed8'
    """
    return hash_sorted(sorted(tensors, key=lambda item: item[0]))


def hash_sorted(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return `hash_tensors` of tensors that come in the order of their names; one of them is in memory at a time."""
    digest = hashlib.sha256()
    for name, x in tensors:
        digest.update(f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)}\n".encode())
        digest.update(memoryview(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data))
    return digest.hexdigest()


# -- pinning -----------------------------------------------------------------------------------------------------------


def pin_model(name: str) -> Backbone:
    """Return where a built model is now, with the commit of a repository."""
    path = Path(name)
    if path.exists():
        return Backbone(kind="model", name=name, location=str(path.resolve()))
    cached = cached_file(name, "config.json")
    assert cached is not None  # a file that is missing raises
    found = _hub_location(Path(cached))
    return Backbone(kind="model", name=name, location=name, revision=None if found is None else found[1])


def pin_language_model(source: LanguageModelSource) -> Backbone:
    """Return where a language model's weights are now, with the commit of a repository."""
    path, file = Path(source.location), source.keywords.get("gguf_file")
    if path.exists():
        return Backbone(kind="path", name=source.name, location=str(path.resolve()), file=file)
    revision = source.keywords.get("revision")
    cached = cached_file(source.location, file or "config.json", revision=revision)
    assert cached is not None  # a file that is missing raises
    found = _hub_location(Path(cached))
    commit = revision if found is None else found[1]
    return Backbone(kind="hub", name=source.name, location=source.location, revision=commit, file=file)


def pin_tower(name: str, tower: Tower) -> tuple[Backbone, Tower]:
    """Return where a tower's weights are now, and the tower with its weights fetched."""
    if isinstance(tower.weights, OutsideWeights):
        return Backbone(kind="package", name=name, location=tower.weights.argument), tower
    if isinstance(tower.weights, RepositoryWeights):
        return _pin_repository(name, tower, tower.weights)
    path = fetch_weights(tower)
    fetched, model_config = replace(tower, weights=WeightsFile(path)), dict(tower.model_config)
    if found := _hub_location(path):
        repository, revision, file = found
        return Backbone(
            kind="hub", name=name, location=repository, revision=revision, file=file, model_config=model_config
        ), fetched
    url = tower.weights.record.get("url") if isinstance(tower.weights, PublishedWeights) else None
    kind: Literal["url", "path"] = "url" if url else "path"
    return Backbone(kind=kind, name=name, location=url or str(path.resolve()), model_config=model_config), fetched


def _pin_repository(name: str, tower: Tower, weights: RepositoryWeights) -> tuple[Backbone, Tower]:
    """Return where the weights of a vision model of Transformers are now, and the tower at that commit."""
    path = Path(weights.location)
    if path.exists():
        return Backbone(kind="path", name=name, location=str(path.resolve())), tower
    cached = cached_file(weights.location, "config.json", revision=weights.revision)
    assert cached is not None  # a file that is missing raises
    found = _hub_location(Path(cached))
    commit = weights.revision if found is None else found[1]
    pinned = replace(tower, weights=replace(weights, revision=commit))
    return Backbone(kind="hub", name=name, location=weights.location, revision=commit), pinned


def _hub_location(path: Path) -> tuple[str, str, str] | None:
    """Return repository, commit and file of a path in the hub's cache; None for another path.

    A path in the cache is …/models--ORG--NAME/snapshots/COMMIT/FILE.
    """
    for folder in path.absolute().parents:
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            repository = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
            return repository, folder.name, str(path.absolute().relative_to(folder))
    return None


# -- locating ----------------------------------------------------------------------------------------------------------


class BackboneMissing(CheckpointError):
    """A backbone that cannot be read; the message says how to get it."""


@contextmanager
def blaming(directory: str, part: str, backbone: Backbone | None) -> Iterator[None]:
    """Turn any error inside the block into a BackboneMissing; without a backbone, leave errors alone."""
    try:
        yield
    except Exception as error:
        if backbone is None:
            raise
        how = {
            "hub": f"Fetch it where there is a network (hf download {backbone.location} --revision "
            f"{backbone.revision}), and copy the cache (HF_HOME).",
            "path": "Put it back there.",
            "url": f"Download {backbone.location} yourself if you trust it.",
            "package": "Install the package that provides it.",
            "model": "Put it back there." if backbone.revision is None else "Fetch it where there is a network.",
        }[backbone.kind]
        raise BackboneMissing(
            f"{directory!r} leaves out the tensors of its {part.replace('_', ' ')}, which cannot be read from "
            f"{backbone}: {first_line(error)}. {how} {advice(part)}"
        ) from None


def advice(part: str) -> str:
    """Say how a user names another place of a part's pretrained weights."""
    return f"If it is elsewhere, say where: --backbone {part}=PATH, or vlm_cli.load(…, backbones={{{part!r}: PATH}})."


def locate_tower(config: VLMConfig, backbone: Backbone | None, hosts: frozenset[str], downloads: ExitStack) -> Tower:
    """Return the tower of a configuration, with the weights of its backbone; with random ones without a backbone.

    Args:
        config: of the VLM.
        backbone: where the weights are.
        hosts: hosts that may be asked for weights.
        downloads: keeps a file that was fetched if it closes without an error.

    Raises:
        Exception: if the weights cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    settings = {key: x for key, x in config.vision_config.items() if key not in ("num_patches", "dim", "grid")}
    if backbone is None:
        return Tower(settings, {})
    tower = Tower(settings, backbone.model_config or {})
    if settings.get("type") in ENCODER_TYPES and not Path(backbone.location).is_file():
        return replace(tower, weights=RepositoryWeights(backbone.location, backbone.revision))
    if tower.is_outside and settings["type"] not in ENCODER_TYPES:
        return replace(tower, weights=OutsideWeights(backbone.location))
    if backbone.kind == "hub":
        assert backbone.revision is not None
        resolve_inside(Path(backbone.revision), backbone.file, named_by="config.json")
        assert backbone.file is not None
        # A commit that is in the cache is taken from there, without asking the hub.
        use_cache_without_network()
        path = hf_hub_download(backbone.location, backbone.file, revision=backbone.revision)
        return replace(tower, weights=WeightsFile(Path(path)))
    if backbone.kind == "url":
        return replace(tower, weights=WeightsFile(_fetch(config, tower, backbone, hosts, downloads)))
    return replace(tower, weights=WeightsFile(_find_file(backbone)))


def _fetch(config: VLMConfig, tower: Tower, backbone: Backbone, hosts: frozenset[str], downloads: ExitStack) -> Path:
    """Return the file of a tower's weights at an address.

    Raises:
        CheckpointError: for a host that the user did not allow.
    """
    encoder = config.composition.vision_encoder
    url, host = backbone.location, urlsplit(backbone.location).hostname
    if url == published_address(encoder.name, encoder.pretrained):
        if (Path("~/.cache/clip").expanduser() / os.path.basename(url)).is_file():
            return fetch_weights(replace(tower, weights=PublishedWeights({"url": url})))  # OpenCLIP fetched it before
    elif host not in hosts:
        raise CheckpointError(
            f"its config.json names an address that is not in OpenCLIP's table of pretrained weights, and vlm fetches "
            f"nothing from there. If you trust {host}, add --allow-host {host}"
        )
    most = _FILE_PER_TENSORS * backbone.bytes + _FILE_SLACK
    return downloads.enter_context(downloaded(url, key=backbone.sha256, most=most, allow_hosts=hosts))


#: How much larger a file may be than the tensors that a delta leaves out: it may hold a text tower, and twice the bytes
#: of each number.
_FILE_PER_TENSORS = 8
_FILE_SLACK = 16 * 2**20  # bytes; a file of TorchScript holds code


def _find_file(backbone: Backbone) -> Path:
    """Return the weight file of a tower in a file or directory."""
    place = Path(backbone.location)
    path = place if place.is_file() else None
    if place.is_dir():
        path = resolve_inside(place, backbone.file, named_by="config.json") if backbone.file else weights_in(place)
    if path is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {backbone.location!r}")
    return path


def locate_language_model(backbone: Backbone, trust_remote_code: bool) -> LanguageModelSource:
    """Return the language model of a backbone.

    Raises:
        LanguageModelError: if it cannot be found.
    """
    name = backbone.location
    if backbone.file is not None:
        name = str(resolve_inside(Path(name), backbone.file, named_by="config.json"))
    options = LanguageModelOptions(name=name, revision=backbone.revision)
    return find_language_model(options, trust_remote_code=trust_remote_code)
