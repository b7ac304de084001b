"""Shards in an object store: `s3://BUCKET/rows.jsonl`, `gs://BUCKET/rows/`, and whatever else fsspec knows.

A shard is copied to this machine when it is read. A process copies the shards that it reads, and no others.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_cli.data.sources.files import Shards
from vlm_cli.data.sources.folders import ENDINGS
from vlm_cli.errors import DataError, UsageError, first_line

__all__ = ["RemoteShards", "find_file_system", "is_remote"]

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://")
#: Schemes of pages and repositories, and of files, which have other ways into `vlm`.
_OTHERS = ("data", "file", "ftp", "git", "github", "hf", "http", "https", "sftp", "ssh")


def is_remote(text: str) -> bool:
    """Tell whether a text names something in an object store."""
    found = _URL.match(text)
    return found is not None and found[1] not in _OTHERS


def find_file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Raises:
        UsageError: if fsspec, or the package for this kind of store, is not installed.
        DataError: if the store cannot be reached.
    """
    try:
        import fsspec
    except ImportError:
        raise UsageError(f"{url!r} needs the package fsspec, which is missing: pip install fsspec") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url!r} cannot be opened: {first_line(error)}") from None
    except Exception as error:
        raise DataError(f"{url!r} cannot be opened: {first_line(error)}") from None
    return system, path


class RemoteShards(Shards):
    """Files of an object store.

    Args:
        url: of a file, of a folder of files of records, or with `*`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.system, path = find_file_system(url)
        try:
            self.remote = self._find(path)
        except Exception as error:
            raise DataError(f"{url!r} cannot be read: {first_line(error)}") from None
        if not self.remote:
            raise DataError(f"{url!r} is no file, and no folder with files of records ({', '.join(ENDINGS)}).")
        start = len(self.remote[0].rpartition("/")[0]) + 1
        self.names = [name[start:] for name in self.remote]
        self._local: dict[int, Path] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="vlm-shards-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def _find(self, path: str) -> list[str]:
        if "*" in path:
            return sorted(self.system.glob(path))
        if self.system.isfile(path):
            return [path]
        found = (PurePosixPath(str(name)) for name in self.system.ls(path, detail=False))
        return sorted(str(x) for x in found if x.suffix.lower() in ENDINGS and not x.name.startswith((".", "_")))

    def is_here(self, index: int) -> bool:
        return index in self._local or index == 0

    def identity(self) -> str:
        return " ".join(f"{name}@{self.system.ukey(path)}" for name, path in zip(self.names, self.remote, strict=True))

    def path(self, index: int) -> Path:
        if index not in self._local:
            target = self.folder / f"{index:05}-{PurePosixPath(self.names[index]).name}"
            try:
                self.system.get_file(self.remote[index], str(target))
            except Exception as error:
                target.unlink(missing_ok=True)
                raise DataError(f"cannot copy {self.names[index]!r} of {self.url!r}: {first_line(error)}") from None
            self._local[index] = target
        return self._local[index]
