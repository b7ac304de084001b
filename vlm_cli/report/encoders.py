"""Facts about vision encoders before they are composed: sizes, and the weights that OpenCLIP can fetch.

We measure sizes on the meta device. That takes a fraction of a second for each encoder, after seconds of imports.
The facts of OpenCLIP's encoders are stored in a file, and to read it imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError
from vlm_cli.files import replacing_file
from vlm_cli.interrupt import at_signal
from vlm_cli.version import __version__

__all__ = ["EncoderFacts", "cache_file", "encoder_facts", "measure_encoder", "store_facts", "stored_facts"]

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


def encoder_facts(
    names: Sequence[str],
    find_config: Callable[[str], Mapping[str, Any]],
    track: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> dict[str, EncoderFacts]:
    """Return the facts of OpenCLIP's encoders. Measure and store the facts that the file lacks.

    After a signal, the file holds what was measured until then.

    Args:
        names: names of OpenCLIP.
        find_config: returns the configuration of a name that has to be measured.
        track: passes on the names that have to be measured, and may show the progress.
    """
    facts = stored_facts()
    missing = [name for name in names if name not in facts]
    if missing:
        measured: dict[str, EncoderFacts] = {}
        try:
            with at_signal(lambda: store_facts(measured)):
                for name, found in _measure_all(track(missing), find_config):
                    measured[name] = found
        finally:
            store_facts(measured)
        facts |= measured
    return {name: facts[name] for name in names}


def _measure_all(
    names: Iterable[str], find_config: Callable[[str], Mapping[str, Any]]
) -> Iterable[tuple[str, EncoderFacts]]:
    from open_clip.pretrained import list_pretrained_tags_by_model

    # A quarter of the names share their image tower with another name, and differ in the text tower or the activation.
    known: dict[str, EncoderFacts] = {}
    for name in names:
        config = find_config(name)
        key = json.dumps([config["embed_dim"], config["vision_cfg"]], sort_keys=True)
        if key not in known:
            known[key] = measure_encoder(config)
        tags = tuple(list_pretrained_tags_by_model(name))
        yield name, EncoderFacts(**{**asdict(known[key]), "pretrained": tags})


def measure_encoder(config: Mapping[str, Any]) -> EncoderFacts:
    """Build one encoder without allocating a weight, and read the shape of its features.

    Args:
        config: the argument of `vlm_cli.modeling.towers.build_tower`.
    """
    import torch

    from vlm_cli.modeling.towers import build_tower, find_image_size, patch_features

    with torch.device("meta"), torch.no_grad():
        tower = build_tower(config).eval()
        size = find_image_size(tower)
        _, patches, channels = patch_features(tower, torch.empty(1, 3, *size)).shape
    parameters = sum(p.numel() for p in tower.parameters())
    return EncoderFacts(image_size=size, patches=patches, channels=channels, parameters=parameters)


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
        data = json.loads(cache_file().read_text(encoding="utf-8"))
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
