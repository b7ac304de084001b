"""What a sweep reads, by hashes: data and parts that changed between two of its runs would make them incomparable."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm_cli.composition import Composition, SeveralEncoderOptions
from vlm_cli.data.mixture import is_mixture_file
from vlm_cli.errors import DataError, UsageError
from vlm_cli.sweeps.plan import MADE, Plan
from vlm_cli.version import __version__

__all__ = ["changes_of", "check_unchanged", "hash_data", "hash_parts", "list_versions"]

_END = 1 << 20  # bytes of the beginning and of the end of a large file that are hashed
_PACKAGES = ("torch", "transformers", "accelerate", "open_clip_torch")


def hash_data(plan: Plan) -> dict[str, str]:
    """Return the hash of each source of records to learn.

    Raises:
        VLMError: if one cannot be read.
    """
    names = [x.data for x in plan.mixture.ingredients]
    found = {_name(name): source.digest() for name, source in zip(names, plan.mixture.open(), strict=True)}
    return found | {
        _name(x): _hash_file(Path(x), hashlib.sha256()).hexdigest() for x in plan.data if is_mixture_file(x)
    }


def hash_parts(compositions: Sequence[Composition]) -> dict[str, str]:
    """Return a hash of each part that is a file or folder here: of names, sizes, beginnings and ends of its files.

    Raises:
        DataError: if one cannot be read.
    """
    found: dict[str, str] = {}
    for name in (name for x in compositions for name in _part_names(x)):
        path = Path(name.removeprefix("local-dir:").removeprefix("hf:"))
        if _name(str(path)) in found or not path.exists():
            continue
        digest = hashlib.sha256()
        files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.is_file())
        for file in files:
            digest.update(f"{os.path.relpath(file, path)}\0".encode())
            _hash_file(file, digest)
        found[_name(str(path))] = digest.hexdigest()
    return found


def list_versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return {"vlm_cli": __version__, **{name: version(name) for name in _PACKAGES}}


def changes_of(made: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """Return what of the inputs is another than when a sweep was made; what either lacks is left out."""
    before = made.get("inputs") or {}
    return [name for name, x in inputs.items() if name in before and before[name] != x]


def check_unchanged(values: Mapping[str, Any], inputs: Mapping[str, str], out: Path) -> None:
    """Check that the results of a folder were made of these inputs.

    Args:
        values: of the sweep that wrote the folder.
        inputs: of this sweep.
        out: the folder.

    Raises:
        UsageError: naming what has changed.
    """
    if changed := changes_of(values.get(MADE) or {}, inputs):
        names = "".join(f"\n  {name}" for name in changed)
        raise UsageError(
            f"the runs in {str(out)!r} cannot be compared with new ones, because what they read has changed since:"
            f"{names}\nBring it back, write to another --output, or start again with --overwrite."
        )


def _part_names(composition: Composition) -> Iterator[str]:
    encoder, lm = composition.vision_encoder, composition.language_model
    several = encoder.encoders if isinstance(encoder, SeveralEncoderOptions) else (encoder,)
    for one in several:
        yield from (x for x in (one.name, one.pretrained) if x)
    yield from (x for x in (lm.name, lm.tokenizer) if x)


def _name(text: str) -> str:
    """Return the same name for the same path, however it is written."""
    return os.path.normpath(text) if os.path.exists(text) else text


def _hash_file(path: Path, digest: Any) -> Any:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{size}\0".encode() + file.read(_END))
            if size > _END:
                file.seek(max(_END, size - _END))
                digest.update(file.read(_END))
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}.") from None
    return digest
