"""Shards that are files: their names, their paths, and whether they are still what they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vlm_cli.data.sources.base import Source
from vlm_cli.errors import DataError

__all__ = ["FileSource", "Shards", "name_shard", "reading_shard"]

_STEP = 1 << 20  # bytes per read
_WHOLE = 1 << 30  # bytes of a source up to which its digest covers every byte
_BLOCK = 1 << 16  # bytes of a sample
_SAMPLES = 64  # blocks of a larger shard that the digest covers, beside its size


class Shards:
    """The files of a source.

    Args:
        paths: of the files.
        folder: which all names leave out; None for the folder of the first file.
    """

    def __init__(self, paths: Sequence[Path], folder: Path | None = None) -> None:
        self.paths = list(paths)
        self.folder = self.paths[0].absolute().parent if folder is None else folder
        self.names = [_name(path, self.folder) for path in self.paths]

    def is_here(self, index: int) -> bool:
        """Tell whether a shard is on this machine, so that `path` costs nothing."""
        return True

    def identity(self) -> str:
        """Name what the shards hold, if that is known without reading them; empty otherwise."""
        return ""

    def path(self, index: int) -> Path:
        """Return where a shard is on this machine.

        Raises:
            DataError: if it must be downloaded first, and that fails.
        """
        return self.paths[index]


class FileSource(Source):
    """A source whose shards are files of one kind.

    Args:
        name: what the user typed.
        files: the shards.
    """

    def __init__(self, name: str, files: Shards) -> None:
        self.name, self.files = name, files
        self.shards, self.folder = files.names, files.folder

    def digest(self) -> str:
        """Hash the bytes of all shards; of a source beyond 1 GiB, each shard's size and 64 blocks of it."""
        if identity := self.files.identity():
            return hashlib.sha256(identity.encode()).hexdigest()
        sizes = [self._size(i) for i in range(len(self.shards))]
        digest = hashlib.sha256()
        for index, size in enumerate(sizes):
            with reading_shard(self, index), self.files.path(index).open("rb") as file:
                if sum(sizes) <= _WHOLE:
                    while step := file.read(_STEP):
                        digest.update(step)
                else:
                    digest.update(f"{self.shards[index]} {size}\n".encode("utf-8", "surrogateescape"))
                    for block in _sample(file, size):
                        digest.update(block)
        return digest.hexdigest()

    def _size(self, index: int) -> int:
        with reading_shard(self, index):
            return self.files.path(index).stat().st_size


@contextmanager
def reading_shard(source: Source, index: int) -> Iterator[None]:
    """Turn an error of the system into one that names the shard.

    Raises:
        DataError: if the block cannot read the shard.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"the file {name_shard(source, index)} is gone. Put it back, or leave it out.") from None
    except OSError as error:
        raise DataError(f"cannot read {name_shard(source, index)}: {error.strerror or error}.") from None


def name_shard(source: Source, index: int) -> str:
    """Name a shard for a message, and its source if that has another name."""
    name = source.shards[index]
    return repr(name) if name == Path(source.name).name else f"{name!r} of {source.quoted}"


def _name(path: Path, folder: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def _sample(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield blocks of a file, from its start to its end."""
    for i in range(_SAMPLES):
        file.seek(max(0, size - _BLOCK) * i // (_SAMPLES - 1))
        yield file.read(_BLOCK)
