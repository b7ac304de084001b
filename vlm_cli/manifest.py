"""The manifest of a model's directory: which files were written, how long they are, and their hashes.

    vlm_manifest.json    {"files": {"config.json": {"bytes": 2762, "sha256": "9f86d08…"}, …}}

A manifest finds what a copy lost or mixed up, and what somebody edited. It does not say who wrote the files: whoever
changes a file can write another manifest, too. Files that it does not name, and README.md, may hold anything.

    with recording(folder):        # writes the manifest of what is written inside the block
        model.save_pretrained(folder)
    compare_files(folder)          # says which files are other ones now
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError
from vlm_cli.files import replacing_file
from vlm_cli.plain_data import read_json
from vlm_cli.schema import Kind, check, mapping, mapping_of, whole

__all__ = [
    "MANIFEST_FILE",
    "FileRecord",
    "ManifestReport",
    "compare_files",
    "read_manifest",
    "recording",
    "sign",
    "write_now",
]

MANIFEST_FILE = "vlm_manifest.json"

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf")
#: Endings of files that a manifest names: what loaders read.
_NAMED = (*_WEIGHTS, ".json", ".jinja", ".txt", ".model", ".yaml", ".py")
#: Files with such endings that say how a directory came about. No loader reads them.
_UNNAMED = (MANIFEST_FILE, "vlm_export.json", "training_args.json")
#: Bytes of a weight file that is hashed each time that it is loaded. A larger one is hashed on request.
_SMALL = 16 << 20


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ManifestReport:
    """How the files of a directory differ from its manifest.

    Attributes:
        edited: names of small files that hold something else, or are gone.
        wrong: one sentence for each weight file that is another one, or gone.
        hashed: how many files were read to the end and compared.
        unread: how many weight files were compared by their size alone.
    """

    edited: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    hashed: int = 0
    unread: int = 0


# -- reading -----------------------------------------------------------------------------------------------------------

_HASH = Kind("a SHA-256 hash of 64 digits", lambda x: isinstance(x, str) and len(x) == 64)
_MANIFEST = mapping({"files": mapping_of(mapping({"bytes": whole(0, 2**60), "sha256": _HASH}))})


def read_manifest(folder: Path) -> dict[str, FileRecord] | None:
    """Read the manifest of a directory: name of a file -> its record. None if the directory has no manifest.

    Raises:
        CheckpointError: if the manifest holds something else.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    advice = f"Fetch the directory again, or write a new manifest: vlm doctor {shlex.quote(str(folder))} --sign"
    try:
        data = read_json(path)
        check(data, _MANIFEST, repr(str(path)))
        if outside := [name for name in data["files"] if not _is_plain(name)]:
            raise ValueError(f"it names {outside[0][:60]!r}, which is no file of the directory")
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}.") from None
    except CheckpointError as error:
        raise CheckpointError(f"{error} {advice}") from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not valid: {error}. {advice}") from None
    return {name: FileRecord(x["bytes"], x["sha256"]) for name, x in data["files"].items()}


def compare_files(folder: Path, *, verify: bool = False, may_lack: bool = False) -> ManifestReport | None:
    """Compare a directory with its manifest: all sizes, and the hashes of all files that are read quickly.

    Args:
        folder: the directory.
        verify: whether to hash large weight files, too.
        may_lack: whether files may be absent, as in a cache of the hub, which holds what was asked for so far.

    Returns:
        The differences; None if the directory has no manifest.

    Raises:
        CheckpointError: if the manifest cannot be read.
    """
    records = read_manifest(folder)
    if records is None:
        return None
    report, hashed, unread = ManifestReport(), 0, 0
    for name, record in sorted(records.items()):
        path, is_weights = folder / name, name.endswith(_WEIGHTS)
        if not path.is_file():
            if may_lack and not os.path.lexists(path):
                continue
            problem = "is missing"
        elif (size := path.stat().st_size) != record.bytes:
            problem = f"has {size:,} bytes instead of {record.bytes:,}"
        elif is_weights and size > _SMALL and not verify:
            unread += 1
            continue
        else:
            hashed += 1
            problem = "" if _hash(path) == record.sha256 else "has another SHA-256 hash"
        if problem and is_weights:
            report.wrong.append(f"{name} {problem}")
        elif problem:
            report.edited.append(name)
    return ManifestReport(report.edited, report.wrong, hashed, unread)


def _hash(path: Path) -> str:
    """Return the SHA-256 hash of a file.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error.strerror}.") from None
    return found.hexdigest()


def _is_plain(name: str) -> bool:
    """Tell whether a name stays in its directory on every system.

    >>> [_is_plain(x) for x in ("a.json", "sub/a.json", "../a", "/a", "a//b", "C:\\\\a", "")]
    [True, True, False, False, False, False, False]
    """
    return name.isprintable() and not set(name) & set("\\:") and all(x not in ("", ".", "..") for x in name.split("/"))


# -- writing -----------------------------------------------------------------------------------------------------------


class _Recording:
    """Files of a directory before something is written into it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, _states(folder)
        try:
            self.records = read_manifest(folder) or {}
        except CheckpointError:  # it says nothing that could be kept
            self.records = {}

    def write(self) -> None:
        """Write the manifest: new records of what was written since, and the earlier ones of what was not.

        Raises:
            CheckpointError: if the manifest cannot be written.
        """
        after = _states(self.folder)
        written = [name for name, state in after.items() if self.before.get(name) != state]
        kept = {name: record for name, record in self.records.items() if name in after}
        if found := {**kept, **_records(self.folder, written)}:
            _write(self.folder, found)


_current: ContextVar[_Recording | None] = ContextVar("_current", default=None)


def sign(folder: Path) -> int:
    """Write the manifest of all files in a directory, whatever they hold, and return the number of files.

    Raises:
        CheckpointError: if a file cannot be read, or the manifest cannot be written.
    """
    records = _records(folder, _named_files(folder))
    _write(folder, records)
    return len(records)


@contextmanager
def recording(folder: str | os.PathLike[str], *, only_known: bool = False) -> Iterator[None]:
    """Write the manifest of what is written into a directory inside the block.

    Files that were there before keep their records. During the block the directory has no manifest, so that a process
    that is killed leaves a directory that loads. An inner block for the same directory does nothing.

    Args:
        folder: the directory; it need not exist before the block.
        only_known: whether to do nothing if the directory has no manifest yet.

    Raises:
        CheckpointError: if the manifest cannot be written.
    """
    place, outer = Path(folder), _current.get()
    is_inner = outer is not None and outer.folder == place
    if is_inner or (only_known and not (place / MANIFEST_FILE).is_file()):
        yield
        return
    recorded = _Recording(place)
    (place / MANIFEST_FILE).unlink(missing_ok=True)
    token = _current.set(recorded)
    try:
        yield
    finally:
        _current.reset(token)
    recorded.write()


def write_now(folder: str | os.PathLike[str]) -> None:
    """Write the manifest inside a block of `recording`, if there is one for this directory.

    Raises:
        CheckpointError: if the manifest cannot be written.
    """
    recorded = _current.get()
    if recorded is not None and recorded.folder == Path(folder):
        recorded.write()


def _named_files(folder: Path) -> list[str]:
    """List the files of a directory that a manifest names; in folders inside of it, chat templates and adapters."""
    if not folder.is_dir():
        return []
    found = (*folder.iterdir(), *folder.glob("*/*.jinja"), *folder.glob("adapters/*/adapter_*"))
    paths = (path for path in found if path.name.endswith(_NAMED) and path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if name not in _UNNAMED and _is_plain(name) and not name.startswith("."))


def _states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return for each file what changes when the file is written."""
    stats = {name: (folder / name).stat() for name in _named_files(folder)}
    return {name: (x.st_ino, x.st_size, x.st_mtime_ns) for name, x in stats.items()}


def _records(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    return {name: FileRecord((folder / name).stat().st_size, _hash(folder / name)) for name in names}


def _write(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Write a manifest, whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    data: dict[str, Any] = {"files": {name: asdict(records[name]) for name in sorted(records)}}
    with replacing_file(folder / MANIFEST_FILE, overwrite=True) as file:
        file.write(json.dumps(data, indent=2) + "\n")
