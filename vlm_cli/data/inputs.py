"""Inputs that a user names: a file, a pipe such as `<(command)` or /dev/stdin, or `-` for standard input.

A pipe gives its bytes once, so each function here reads its input from the start to the end, and no command reads an
input twice. Relative paths in a pipe start at the working directory, those in a file at the folder of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from vlm_cli.errors import DataError, UsageError
from vlm_cli.lookalike import find_lookalike, find_named
from vlm_cli.registry import suggest

__all__ = ["base_folder", "describe_input", "is_pipe", "is_stdin", "read_bytes", "read_lines", "read_stdin_lines"]


def is_stdin(path: Path) -> bool:
    """Tell whether the user means standard input."""
    return str(path) == "-"


def is_pipe(path: Path) -> bool:
    """Tell whether an input gives its bytes only once."""
    if is_stdin(path) or str(path.absolute()).startswith(("/dev/", "/proc/")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def base_folder(path: Path) -> Path:
    """Return the folder where relative paths in an input start."""
    return Path() if is_pipe(path) else (find_lookalike(path) or path).absolute().parent


def describe_input(path: Path) -> str:
    """Name an input for a message."""
    return "standard input" if is_stdin(path) else repr(str(path))


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of an input.

    Raises:
        DataError: if it cannot be read.
        UsageError: if standard input is a terminal.
    """
    if is_stdin(path):
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("- reads lines from standard input, but nothing is piped in. Add `< FILE.jsonl`.")
        yield from read_stdin_lines()
        return
    path = find_named(path)
    try:
        with path.open("rb") as file:
            yield from file
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a directory. Give the JSONL file in it.") from None
    except FileNotFoundError:
        folder = path.absolute().parent
        near = [x.name for x in folder.iterdir() if x.is_file()] if folder.is_dir() else []
        raise DataError(f"cannot find the records {str(path)!r}.{suggest(path.name, near)}") from None
    except OSError as error:
        raise DataError(f"cannot read the records {str(path)!r}: {error.strerror}.") from None


def read_bytes(path: Path) -> bytes:
    """Read an input to its end.

    Raises:
        OSError: if a file cannot be read.
        DataError: if standard input cannot be read.
    """
    return b"".join(read_stdin_lines()) if is_stdin(path) else find_named(path).read_bytes()


def read_stdin_lines() -> Iterator[bytes]:
    """Yield the lines of standard input; none if it is closed.

    Raises:
        DataError: if it cannot be read.
    """
    if sys.stdin is None:
        return
    try:
        yield from sys.stdin.buffer
    except OSError as error:
        raise DataError(f"cannot read standard input: {error.strerror or error}. Give a file or a pipe.") from None
