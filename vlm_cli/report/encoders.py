"""Facts about vision encoders before they are composed: sizes, and the weights that OpenCLIP can fetch.

`encoders.json` brings the facts of OpenCLIP's encoders; `docs/generate_encoders.py` writes it. What the installed
OpenCLIP has beyond them is measured on the meta device, once, and stored in a file of the user. To measure takes a
fraction of a second for each encoder, after seconds of imports. To read the two files imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError
from vlm_cli.files import replacing_file
from vlm_cli.interrupt import at_signal
from vlm_cli.plain_data import read_json
from vlm_cli.version import __version__

__all__ = [
    "EncoderFacts",
    "EncoderTable",
    "cache_file",
    "encoder_facts",
    "known_facts",
    "measure_encoder",
    "measure_encoders",
    "store_facts",
    "stored_facts",
]

#: Errors of a file that is missing, broken or read-only; we measure again. RuntimeError: no home directory.
_UNUSABLE = (OSError, ValueError, RuntimeError, PackageNotFoundError, CheckpointError)


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """Sizes of one encoder, and the tags of its pretrained weights.

    Attributes:
        image_size: (H, W) pixels.
        patches: v, patches of one frame.
        channels: d, channels of each patch in the last layer.
        parameters: number in the image tower, with its pooling and projection.
        pretrained: tags of the weights that OpenCLIP can fetch.
    """

    image_size: tuple[int, int]
    patches: int
    channels: int
    parameters: int
    pretrained: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EncoderTable:
    """The facts that `encoders.json` brings, each with a digest of what it was measured on.

    A digest, not a version, tells whether an entry holds: most encoders stay as they are when OpenCLIP changes.

    Attributes:
        facts: name -> facts.
        configs: name -> digest of the file with OpenCLIP's configuration.
        tags: digest of OpenCLIP's module that lists the tags.
    """

    facts: Mapping[str, EncoderFacts]
    configs: Mapping[str, str]
    tags: str

    @classmethod
    def read(cls) -> EncoderTable:
        """Read the table that vlm brings."""
        data = read_json(_TABLE)
        entries = data["encoders"]
        configs = {name: entry["config"] for name, entry in entries.items()}
        return cls(facts={name: _read(x) for name, x in entries.items()}, configs=configs, tags=data["tags"])

    @classmethod
    def of(cls, facts: Mapping[str, EncoderFacts], files: Mapping[str, Path]) -> EncoderTable:
        """Make a table of facts that were measured on the configurations in `files`."""
        configs = {name: _digest(files[name]) for name in facts}
        return cls(facts=facts, configs=configs, tags=_digest(_tags_module(files)))

    def write(self) -> None:
        """Replace the table that vlm brings; each encoder has a line."""
        lines = [
            f"    {json.dumps(name)}: {json.dumps({**asdict(facts), 'config': self.configs[name]})}"
            for name, facts in sorted(self.facts.items())
        ]
        text = f'{{\n  "tags": {json.dumps(self.tags)},\n  "encoders": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
        _TABLE.write_text(text, encoding="utf-8")

    def sizes_for(self, files: Mapping[str, Path]) -> dict[str, EncoderFacts]:
        """Return the facts whose configuration is the one in `files`; their tags may be those of another version."""
        return {
            name: facts
            for name, facts in self.facts.items()
            if name in files and _digest(files[name]) == self.configs[name]
        }

    def has_tags_for(self, files: Mapping[str, Path]) -> bool:
        """Tell whether OpenCLIP's module of tags beside `files` is the one that the table was made from."""
        return bool(files) and _digest(_tags_module(files)) == self.tags


_TABLE = Path(__file__).with_name("encoders.json")


def _tags_module(files: Mapping[str, Path]) -> Path:
    """Return OpenCLIP's module that lists the tags; `files` stand in a folder beside it."""
    return next(iter(files.values())).parent.parent / "pretrained.py"


def _digest(file: Path) -> str:
    """Return a digest of a text file, which is the same on every system."""
    try:
        return hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:16]
    except OSError:
        return ""


def known_facts(files: Mapping[str, Path]) -> dict[str, EncoderFacts]:
    """Return the facts that need no measurement: those of the table, and those that were measured before.

    Args:
        files: the names of the installed OpenCLIP, and the files with their configurations.
    """
    table = EncoderTable.read()
    return {**stored_facts(), **(table.sizes_for(files) if table.has_tags_for(files) else {})}


def encoder_facts(
    names: Sequence[str],
    files: Mapping[str, Path],
    find_config: Callable[[str], Mapping[str, Any]],
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
    on_problem: Callable[[str, Exception], None] | None = None,
) -> dict[str, EncoderFacts]:
    """Return the facts of OpenCLIP's encoders. Measure and store the facts that nobody knows.

    After a signal, the file holds what was measured until then.

    Args:
        names: names of OpenCLIP.
        files: the names of the installed OpenCLIP, and the files with their configurations.
        find_config: returns the configuration of a name that has to be measured.
        track: passes on the names that have to be measured, and may show the progress.
        on_problem: receives the name of an encoder that cannot be measured, and the error; the result lacks this
            encoder. Without this function, the error is raised.
    """
    facts = known_facts(files)
    missing = [name for name in names if name not in facts]
    if missing:
        measured: dict[str, EncoderFacts] = {}
        sizes = EncoderTable.read().sizes_for(files)
        try:
            with at_signal(lambda: store_facts(measured)):
                for name, found in measure_encoders(track(missing), find_config, sizes, on_problem):
                    measured[name] = found
        finally:
            store_facts(measured)
        facts |= measured
    return {name: facts[name] for name in names if name in facts}


def measure_encoders(
    names: Iterable[str],
    find_config: Callable[[str], Mapping[str, Any]],
    sizes: Mapping[str, EncoderFacts] = {},
    on_problem: Callable[[str, Exception], None] | None = None,
) -> Iterator[tuple[str, EncoderFacts]]:
    """Measure encoders; those in `sizes` only get the tags of the installed OpenCLIP."""
    from open_clip.pretrained import list_pretrained_tags_by_model

    # A quarter of the names share their image tower with another name, and differ in the text tower or the activation.
    same: dict[str, EncoderFacts] = {}
    for name in names:
        try:
            found = sizes[name] if name in sizes else _measure_once(find_config(name), same)
        except Exception as error:  # a version of timm may lack a tower; the others are listed all the same
            if on_problem is None:
                raise
            on_problem(name, error)
            continue
        yield name, replace(found, pretrained=tuple(list_pretrained_tags_by_model(name)))


def _measure_once(config: Mapping[str, Any], same: dict[str, EncoderFacts]) -> EncoderFacts:
    """Measure an encoder, or return what was measured of the same tower, and keep it in `same`."""
    key = json.dumps([config["embed_dim"], config["vision_cfg"]], sort_keys=True)
    if key not in same:
        same[key] = measure_encoder(config)
    return same[key]


def measure_encoder(config: Mapping[str, Any]) -> EncoderFacts:
    """Build one encoder without allocating a weight, and read the shape of its features.

    Args:
        config: the argument of `vlm_cli.modeling.towers.build_tower`.
    """
    from vlm_cli.modeling.meta import meta_device
    from vlm_cli.modeling.towers import build_tower, find_image_size, measure_features

    with meta_device():
        tower = build_tower(config).eval()
    parameters = sum(p.numel() for p in tower.parameters())
    patches, channels = measure_features(tower)
    return EncoderFacts(image_size=find_image_size(tower), patches=patches, channels=channels, parameters=parameters)


# -- stored facts -----------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Return the file for the installed versions, whether or not it exists; other versions have files beside it."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = chosen if chosen.is_absolute() else Path("~").expanduser() / ".cache"  # as the XDG specification asks
    versions = {"vlm": __version__, **{name: version(name) for name in ("open_clip_torch", "timm", "torch")}}
    return folder / "vlm" / f"vision-encoders_{'_'.join(f'{name}-{x}' for name, x in versions.items())}.json"


def stored_facts() -> dict[str, EncoderFacts]:
    """Return the facts that were measured before; none if the file is missing or broken."""
    try:
        data = read_json(cache_file())
        if not isinstance(data, dict):
            raise ValueError("the file holds no dictionary")
        return {name: _read(entry) for name, entry in data.items()}
    except _UNUSABLE:
        return {}


def _read(entry: object) -> EncoderFacts:
    """Read the facts of one encoder.

    Raises:
        ValueError: if anything is missing or has another type.
    """
    match entry:
        case {
            "image_size": [int(height), int(width)],
            "patches": int(patches),
            "channels": int(channels),
            "parameters": int(parameters),
            "pretrained": [*tags],
        }:
            return EncoderFacts(
                image_size=(height, width),
                patches=patches,
                channels=channels,
                parameters=parameters,
                pretrained=tuple(map(str, tags)),
            )
    raise ValueError(f"not the facts of an encoder: {entry!r}")


def store_facts(facts: Mapping[str, EncoderFacts]) -> None:
    """Add facts to the file, if it can be written; a reader sees the old file or the new one, never half of it."""
    if not facts:
        return
    with suppress(*_UNUSABLE):
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        data = {name: asdict(x) for name, x in {**stored_facts(), **facts}.items()}
        with replacing_file(file, overwrite=True) as out:
            json.dump(data, out)
