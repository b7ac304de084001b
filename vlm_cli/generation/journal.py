"""Answers of an unfinished run, from which the next one goes on: `OUT.partial`, and at the end OUT.

{"vlm_batch": 1, "replaces": false, "settings": {"--max-new-tokens": 64, …}}    header
5f0c…e1 {"prompt": "…", "text": " A cat.", …}                                    digest of the input's line, answer
90ab…77 {"prompt": "…", "err                                                     cut short by a kill: dropped
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vlm_cli.data.jsonl import Line
from vlm_cli.errors import CheckpointError, OutputExistsError, UsageError
from vlm_cli.files import check_file, replacing_file
from vlm_cli.resume import settings_diff

__all__ = ["Journal", "partial_of"]

_MAGIC = b'{"vlm_batch": 1, '


def partial_of(out: Path) -> Path:
    """Where the answers of `out` are kept until all are there."""
    return out.with_name(f"{out.name}.partial")


@dataclass
class Journal:
    """An open `OUT.partial`, of which no other process writes.

    Attributes:
        out: what it becomes.
        answered: rows in it.
        failed: those of them with an error.
    """

    out: Path
    file: BinaryIO
    answered: int = 0
    failed: int = 0

    @classmethod
    def open(cls, out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Journal:
        """Begin, or find what an unfinished run with the same settings left.

        Args:
            out: the file to write in the end.
            settings: flags and values on which answers depend.
            overwrite: replace `out`, and forget an unfinished run.

        Raises:
            OutputExistsError: if `out` may not be written, or another process is at it.
            UsageError: if an unfinished run had other settings, naming them.
            CheckpointError: if the folder takes no files.
        """
        check_file(out, overwrite=True)
        path = partial_of(out)
        try:
            file = path.open("a+b")
        except OSError as error:
            raise CheckpointError(f"cannot write {str(path)!r}: {error.strerror}.") from None
        _lock(file, path)
        journal = cls(out, file)
        try:
            journal._begin(settings, overwrite)
        except BaseException:
            journal.close(remove=not path.stat().st_size)
            raise
        return journal

    @property
    def path(self) -> Path:
        return partial_of(self.out)

    def _begin(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        self.file.seek(0)
        head = self.file.readline()
        if head[: len(_MAGIC)] != _MAGIC[: len(head)]:
            raise OutputExistsError(
                f"{str(self.path)!r} is not what vlm left of an unfinished run. Move it away, or choose another "
                "--output."
            )
        whole = head.endswith(b"\n")
        found = json.loads(head) if whole else {}
        check_file(self.out, overwrite=overwrite or found.get("replaces", False))
        if whole and not overwrite:
            self._check(found["settings"], settings)
            return
        self.file.truncate(0)
        self._write({"vlm_batch": 1, "replaces": overwrite, "settings": settings})

    def _check(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if differences := settings_diff(was, now):
            raise UsageError(
                f"{str(self.path)!r} holds answers of an unfinished run, which differs from this one:\n{differences}\n"
                "Give the same again to go on with it, or add --overwrite to forget it and start anew."
            )

    def skip(self, lines: Iterator[Line], name: str) -> None:
        """Go past the lines that are answered, and drop an answer that was cut short.

        Args:
            lines: of the input, from its beginning.
            name: of the input, for messages.

        Raises:
            UsageError: if they are not the lines that were answered.
        """
        self.file.seek(0)
        end = len(self.file.readline())
        for stored in self.file:
            if not stored.endswith(b"\n"):
                break
            line = next(lines, None)
            if line is None or _digest(line) != stored.split(b" ", 1)[0]:
                where = f"ends before row {self.answered + 1}" if line is None else f"has another line {line.number}"
                raise UsageError(
                    f"{str(self.path)!r} holds answers of an unfinished run, and {name} {where} than was answered "
                    "there. Give the same input to go on with it, or add --overwrite to forget it and start anew."
                )
            end += len(stored)
            self.answered += 1
            self.failed += "error" in json.loads(stored.split(b" ", 1)[1])
        self.file.truncate(end)

    def add(self, line: Line, answer: Mapping[str, Any]) -> None:
        """Write an answer so that it outlives this process.

        Raises:
            CheckpointError: if the disk is full.
        """
        self._write(answer, _digest(line) + b" ")
        self.answered += 1
        self.failed += "error" in answer

    def _write(self, data: Mapping[str, Any], before: bytes = b"") -> None:
        # Half a character, which no file holds, is written as JSON escapes it.
        text = json.dumps(data, ensure_ascii=False).encode("utf-8", "backslashreplace")
        try:
            self.file.write(before + text + b"\n")
            self.file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {str(self.path)!r}: {error.strerror}.") from error

    def finish(self) -> None:
        """Make the answers OUT.

        Raises:
            CheckpointError: if the disk is full. The answers stay.
        """
        self.file.seek(0)
        self.file.readline()
        with replacing_file(self.out, overwrite=True) as out:
            for stored in self.file:
                out.write(stored.split(b" ", 1)[1].decode("utf-8"))
        self.close(remove=True)

    def close(self, *, remove: bool = False) -> None:
        """Let go of the file; `remove` it if it is of no use."""
        if remove:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self.file.close()


def _digest(line: Line) -> bytes:
    """Hexadecimal, 32 digits; the last line of a file may lack its end."""
    return hashlib.sha256(line.raw.strip()).hexdigest()[:32].encode()


def _lock(file: BinaryIO, path: Path) -> None:
    """
    Raises:
        OutputExistsError: if another process has the lock.
    """
    if os.name != "posix":
        return
    import fcntl

    try:
        # Not `flock`, whose lock the workers of a killed process would keep for some seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise OutputExistsError(
            f"{str(path)!r} is being written by another vlm. Wait for it, or choose another --output."
        ) from None
    except OSError:
        return  # a file system without locks
