"""Recognise what a user names as data, by its content."""

from __future__ import annotations

import re
from pathlib import Path

from vlm_cli.data.inputs import is_pipe
from vlm_cli.data.sources.base import Source
from vlm_cli.data.sources.files import FileSource, Shards
from vlm_cli.data.sources.json_array import JsonArray
from vlm_cli.data.sources.json_lines import JsonLines, PipedLines
from vlm_cli.errors import DataError
from vlm_cli.lookalike import find_named
from vlm_cli.registry import suggest

__all__ = ["open_source"]

_HEAD = 4096  # bytes by which a file is recognised
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")


def open_source(text: str) -> Source:
    """Open what a user names: a file, or a pipe of JSON lines.

    Args:
        text: what the user typed.

    Raises:
        DataError: if it does not exist, or is nothing that vlm reads.
    """
    path = Path(text)
    if is_pipe(path):
        return PipedLines(path)
    path = find_named(path)
    return _recognise(_read_head(path))(text, Shards([path]))


def _recognise(head: bytes) -> type[FileSource]:
    return JsonArray if _ARRAY.match(head) else JsonLines


def _read_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a directory. Give the JSONL file in it.") from None
    except FileNotFoundError:
        folder = path.absolute().parent
        near = [x.name for x in folder.iterdir() if x.is_file()] if folder.is_dir() else []
        raise DataError(f"cannot find the records {str(path)!r}.{suggest(path.name, near)}") from None
    except OSError as error:
        raise DataError(f"cannot read the records {str(path)!r}: {error.strerror}.") from None
