"""Where the files of `vlm batch --engine ray` go: a folder or a place in an object store. A file is whole or absent."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlm_cli.data.sources.remote import find_file_system, is_remote
from vlm_cli.errors import CheckpointError, first_line
from vlm_cli.files import remove_leftovers

__all__ = ["PartStore", "find_store"]


class PartStore(Protocol):
    """A place of files."""

    @property
    def name(self) -> str:
        """How a user names it."""

    def exists(self) -> bool:
        """Tell whether there is anything at the place."""

    def names(self) -> set[str]:
        """Return the names of its files; none where there is nothing."""

    def read(self, name: str) -> bytes:
        """Return what a file holds."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file, which appears whole or not at all.

        Raises:
            CheckpointError: if that fails.
        """

    def remove(self, name: str) -> None:
        """Remove a file."""


def find_store(output: str) -> PartStore:
    """Return the place that `--output` names.

    Raises:
        UsageError: if the package for this kind of store is not installed.
    """
    if not is_remote(output):
        return _Folder(Path(output).resolve(), output)
    find_file_system(output)
    return _Bucket(output.rstrip("/"))


@dataclass(frozen=True)
class _Folder:
    """A folder of this machine, or one that all machines share."""

    folder: Path
    name: str

    def exists(self) -> bool:
        return self.folder.exists()

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        hidden = path.with_name(f".{name}.{os.getpid()}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
            hidden.write_bytes(content)
            hidden.replace(path)
        except OSError as error:
            raise CheckpointError(f"cannot write {str(path)!r}: {error.strerror}.") from None
        finally:
            hidden.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


@dataclass(frozen=True)
class _Bucket:
    """A place in an object store, in which an upload appears when it is over."""

    name: str

    @property
    def _system(self) -> tuple[Any, str]:
        return find_file_system(self.name)  # which fsspec keeps; this object goes to other processes

    def exists(self) -> bool:
        system, path = self._system
        return bool(system.exists(path))

    def names(self) -> set[str]:
        system, path = self._system
        system.invalidate_cache()
        try:
            return {str(name).rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False)}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes:
        system, path = self._system
        return bytes(system.cat_file(f"{path}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        system, path = self._system
        try:
            system.makedirs(path, exist_ok=True)
            system.pipe_file(f"{path}/{name}", content)
        except Exception as error:
            raise CheckpointError(f"cannot write {f'{self.name}/{name}'!r}: {first_line(error)}.") from None

    def remove(self, name: str) -> None:
        system, path = self._system
        system.rm_file(f"{path}/{name}")
