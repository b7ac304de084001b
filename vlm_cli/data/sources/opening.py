"""Recognise what a user names as data, by its content."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from vlm_cli.data.inputs import is_pipe
from vlm_cli.data.sources.base import Source
from vlm_cli.data.sources.documents import JsonDocument, is_document
from vlm_cli.data.sources.files import FileSource, Shards
from vlm_cli.data.sources.folders import find_shards
from vlm_cli.data.sources.foreign import refuse_foreign
from vlm_cli.data.sources.hub import HUB, find_on_hub
from vlm_cli.data.sources.json_array import JsonArray
from vlm_cli.data.sources.json_lines import JsonLines, PipedLines
from vlm_cli.data.sources.mme_folder import MMEFolder, find_mme
from vlm_cli.data.sources.patterns import expand_pattern, is_pattern
from vlm_cli.data.sources.remote import RemoteShards, is_remote
from vlm_cli.data.sources.tab_tables import TabTables, is_tab_table
from vlm_cli.data.sources.tables import ArrowFiles, ArrowStreams, ParquetFiles
from vlm_cli.data.sources.tar_shards import TarShards
from vlm_cli.errors import DataError
from vlm_cli.lookalike import find_named
from vlm_cli.registry import suggest

__all__ = ["open_source"]

_HEAD = 4096  # bytes by which a file is recognised
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")


def open_source(text: str) -> Source:
    """Open what a user names: a file, a pipe of JSON lines, shards, a directory, or a data set of the hub.

    Args:
        text: what the user typed: a path, a pattern such as `train-{000..012}.tar` or `data/*.parquet`, or
            `hf:ORG/NAME[:CONFIG][:SPLIT]`, or a URL of an object store, such as `s3://BUCKET/rows.jsonl`.

    Raises:
        DataError: if it does not exist, or is nothing that vlm reads.
        UsageError: if a package that reads it is not installed.
    """
    if is_remote(text):
        return _open(text, RemoteShards(text), "")
    if text.startswith(HUB):
        found = find_on_hub(text)
        return _open(text, found.shards, found.detail)
    path = Path(text)
    if is_pipe(path):
        return PipedLines(path)
    if is_pattern(text) and not path.exists():
        return _open(text, Shards(expand_pattern(text)), "")
    path = find_named(path)
    if path.is_dir():
        if (questions := find_mme(path)) is not None:
            return MMEFolder(text, questions)
        files, detail = find_shards(path)
        return _open(text, Shards(files, path.absolute()), detail)
    return _open(text, Shards([path]), "")


def _open(name: str, shards: Shards, detail: str) -> Source:
    kinds = [_recognise(shards.path(i)) for i in range(len(shards.names)) if shards.is_here(i)]
    other = next((i for i, kind in enumerate(kinds) if kind is not kinds[0]), None)
    if other is not None:
        raise DataError(
            f"{name!r} mixes kinds: {shards.names[0]!r} is {kinds[0].kind}, and {shards.names[other]!r} "
            f"{kinds[other].kind}. Give each kind as its own --data."
        )
    source = kinds[0](name, shards)
    counted = f"{len(shards.names):,} shards" if len(shards.names) > 1 else ""
    source.detail = ", ".join(x for x in (detail, counted) if x)
    return source


def _recognise(path: Path) -> type[FileSource]:
    head = _read_head(path)
    if head.startswith(b"PAR1"):
        return ParquetFiles
    if head.startswith(b"ARROW1\0\0"):
        return ArrowFiles
    if head.startswith(b"\xff\xff\xff\xff"):
        return ArrowStreams
    if _is_tar(head):
        return TarShards
    if is_tab_table(head):
        return TabTables
    if is_document(path, head):
        return JsonDocument
    refuse_foreign(path, head)
    return JsonArray if _ARRAY.match(head) else JsonLines


def _is_tar(head: bytes) -> bool:
    if head[257:262] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a directory. Give the files in it.") from None
    except FileNotFoundError:
        raise DataError(f"cannot find the records {str(path)!r}.{_suggest_beside(path)}") from None
    except OSError as error:
        raise DataError(f"cannot read the records {str(path)!r}: {error.strerror}.") from None


def _suggest_beside(path: Path) -> str:
    folder = path.absolute().parent
    near: Sequence[str] = [x.name for x in folder.iterdir() if x.is_file()] if folder.is_dir() else []
    return suggest(path.name, near)
