"""What can be said of a vision encoder before it is composed: its sizes, and the weights that OpenCLIP has for it.

Sizes are measured on the meta device, which takes a fraction of a second for each encoder after seconds of imports;
those of OpenCLIP's are kept in a file, from which they are read without importing torch.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm_cli.version import __version__

__all__ = ["EncoderFacts", "cache_file", "encoder_facts", "keep", "kept", "measure"]


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """Sizes of one encoder, and its pretrained tags.

    Attributes:
        image_size: (H, W) pixels.
        patches: v, of one frame.
        channels: d, of each patch in the last layer.
        parameters: of the image tower, its pooling and projection included.
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
    """Facts of OpenCLIP's encoders: those that are kept, and the others measured and kept from then on.

    What was measured before an interruption is kept too.

    Args:
        names: names of OpenCLIP.
        find_config: gives the configuration of a name; called only for those that are measured.
        track: passes on the names that are measured, and may tell of them.
    """
    facts = kept()
    missing = [name for name in names if name not in facts]
    if missing:
        measured: dict[str, EncoderFacts] = {}
        try:
            for name, found in _measure_all(track(missing), find_config):
                measured[name] = found
        finally:
            keep(measured)
        facts |= measured
    return {name: facts[name] for name in names}


def _measure_all(
    names: Iterable[str], find_config: Callable[[str], Mapping[str, Any]]
) -> Iterable[tuple[str, EncoderFacts]]:
    from open_clip.pretrained import list_pretrained_tags_by_model

    # A quarter of the names are of towers that others have too: they differ in the text tower or the activation.
    known: dict[str, EncoderFacts] = {}
    for name in names:
        config = find_config(name)
        key = json.dumps([config["embed_dim"], config["vision_cfg"]], sort_keys=True)
        if key not in known:
            known[key] = measure(config)
        tags = tuple(list_pretrained_tags_by_model(name))
        yield name, EncoderFacts(**{**asdict(known[key]), "pretrained": tags})


def measure(config: Mapping[str, Any]) -> EncoderFacts:
    """Build one encoder without allocating a weight, and look at what it gives for a frame.

    Args:
        config: as `vlm_cli.modeling.towers.build_tower` takes it.
    """
    import torch

    from vlm_cli.modeling.towers import build_tower, image_size, patch_features

    with torch.device("meta"), torch.no_grad():
        tower = build_tower(config).eval()
        size = image_size(tower)
        _, patches, channels = patch_features(tower, torch.empty(1, 3, *size)).shape
    parameters = sum(p.numel() for p in tower.parameters())
    return EncoderFacts(image_size=size, patches=patches, channels=channels, parameters=parameters)


# -- what is kept ----------------------------------------------------------------------------------------------------

#: A missing, broken or unwritable file costs time and nothing else. RuntimeError: there is no home directory.
#: ImportError: a package says nothing of its version. ArithmeticError: a number is infinite.
_NO_CACHE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, ArithmeticError)


def cache_file() -> Path:
    """The file for the installed versions, whether or not it exists; others keep theirs beside it."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = chosen if chosen.is_absolute() else Path.home() / ".cache"  # as the XDG specification asks
    versions = {"vlm": __version__, **{name: version(name) for name in ("open_clip_torch", "timm", "torch")}}
    return folder / "vlm" / f"vision-encoders_{'_'.join(f'{name}-{x}' for name, x in versions.items())}.json"


def kept() -> dict[str, EncoderFacts]:
    """Facts that were measured before; none if the file cannot be read."""
    try:
        data = json.loads(cache_file().read_text(encoding="utf-8"))
        return {name: _read(entry) for name, entry in data.items()}
    except _NO_CACHE:
        return {}


def _read(entry: Mapping[str, Any]) -> EncoderFacts:
    height, width = entry["image_size"]
    sizes = {name: int(entry[name]) for name in ("patches", "channels", "parameters")}
    return EncoderFacts(image_size=(int(height), int(width)), pretrained=tuple(map(str, entry["pretrained"])), **sizes)


def keep(facts: Mapping[str, EncoderFacts]) -> None:
    """Add facts to those that are kept, if that is possible; a reader sees the old file or the new one."""
    if not facts:
        return
    try:
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        data = {name: asdict(x) for name, x in {**kept(), **facts}.items()}
        handle, partial = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".partial", dir=file.parent)
        try:
            with open(handle, "w", encoding="utf-8") as out:
                json.dump(data, out)
            os.replace(partial, file)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except _NO_CACHE:
        return
