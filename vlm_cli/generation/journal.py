"""The file `OUT.partial`: the answers of an unfinished run, from which the next run resumes. At the end it becomes OUT.

{"vlm_batch": 1, "replaces": false, "settings": {"--max-new-tokens": 64, …}}    header
5f0c…e1 {"prompt": "…", "text": " A cat.", …}                                    digest of the input's row, answer
90ab…77 {"prompt": "…", "err                                                     cut short by a kill; dropped
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vlm_cli.data.sources import Row
from vlm_cli.errors import CheckpointError, OutputExistsError, UsageError
from vlm_cli.files import check_file, remove_leftovers, replacing_file
from vlm_cli.locks import open_locked
from vlm_cli.plain_data import parse_json
from vlm_cli.resume import settings_diff

__all__ = ["Journal", "has_failed", "partial_of"]

_MAGIC = b'{"vlm_batch": 1, '


def partial_of(out: Path) -> Path:
    """Return the path at which the answers of `out` wait until all rows are answered."""
    return out.with_name(f"{out.name}.partial")


def has_failed(answer: Mapping[str, Any]) -> bool:
    """Tell whether the answer to a row is an error: of vlm's rows, or of a request of OpenAI's protocol."""
    response = answer.get("response")
    is_refused = isinstance(response, dict) and response.get("status_code", 200) != 200
    return answer.get("error") is not None or is_refused


@dataclass
class Journal:
    """An open `OUT.partial`, locked against other processes.

    Attributes:
        out: the file that it becomes.
        file: open for reading and appending.
        answered: rows in the journal.
        failed: those of them with an error.
        replaces: whether `out` may be replaced at the end.
    """

    out: Path
    file: BinaryIO
    answered: int = 0
    failed: int = 0
    replaces: bool = False

    @classmethod
    def open(cls, out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Journal:
        """Begin a journal, or open the one that an unfinished run with the same settings left.

        Args:
            out: the file to write in the end.
            settings: flags and values on which answers depend.
            overwrite: replace `out`, and discard an unfinished run.

        Raises:
            OutputExistsError: if `out` may not be written, or another process writes its journal.
            UsageError: if an unfinished run had other settings; the message names them.
            CheckpointError: if the folder cannot be written.
        """
        check_file(out, overwrite=True)
        path = partial_of(out)
        try:
            file = open_locked(path)
        except BlockingIOError:
            raise OutputExistsError(
                f"{str(path)!r} is being written by another vlm. Wait for it, or choose another --output."
            ) from None
        except OSError as error:
            raise CheckpointError(f"cannot write {str(path)!r}: {error.strerror}.") from None
        journal = cls(out, file)
        try:
            journal._begin(settings, overwrite)
        except BaseException:
            journal.close(remove=not path.stat().st_size)
            raise
        return journal

    @property
    def path(self) -> Path:
        """The journal itself: `OUT.partial`."""
        return partial_of(self.out)

    @property
    def name(self) -> str:
        """Where the answers are, for messages."""
        return str(self.path)

    def _begin(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        self.file.seek(0)
        head = self.file.readline()
        whole = head.endswith(b"\n")
        found = _parse(head) if whole else {}
        is_header = isinstance(found.get("settings"), dict) if whole else True
        if head[: len(_MAGIC)] != _MAGIC[: len(head)] or not is_header:
            raise OutputExistsError(
                f"{str(self.path)!r} is not the journal of an unfinished run. Move it to another place, or choose "
                "another --output."
            )
        self.replaces = overwrite or found.get("replaces", False)
        check_file(self.out, overwrite=self.replaces)
        if whole and not overwrite:
            self._check(found["settings"], settings)
            return
        self.file.truncate(0)
        self._write({"vlm_batch": 1, "replaces": overwrite, "settings": settings})

    def _check(self, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if differences := settings_diff(was, now):
            raise UsageError(
                f"{str(self.path)!r} holds answers of an unfinished run with other settings:\n{differences}\n"
                "Give the same settings to resume that run, or add --overwrite to discard its answers and start again."
            )

    def skip(self, rows: Iterator[Row], name: str) -> None:
        """Skip the rows that are answered, and drop an answer that was cut short.

        Args:
            rows: the input, from its beginning.
            name: the name of the input, for messages.

        Raises:
            UsageError: if the input has changed since.
        """
        self.file.seek(0)
        end = len(self.file.readline())
        for stored in self.file:
            if not stored.endswith(b"\n"):
                break
            row = next(rows, None)
            if row is None or row.digest.encode() != stored.split(b" ", 1)[0]:
                change = (
                    f"now ends before row {self.answered + 1}"
                    if row is None
                    else f"has another {row.unit} {row.number} now"
                )
                raise UsageError(
                    f"{str(self.path)!r} holds answers of an unfinished run, but {name} {change}. Give the same "
                    "input to resume that run, or add --overwrite to discard its answers and start again."
                )
            end += len(stored)
            self.answered += 1
            answer = _parse(stored.partition(b" ")[2])
            if not answer:
                raise UsageError(
                    f"{str(self.path)!r} is damaged at row {self.answered}. Add --overwrite to discard its answers and "
                    "start again."
                )
            self.failed += has_failed(answer)
        self.file.truncate(end)

    def add(self, row: Row, answer: Mapping[str, Any]) -> None:
        """Append an answer, so that it is kept if this process is killed.

        Raises:
            CheckpointError: if the disk is full.
        """
        self._write(answer, row.digest.encode() + b" ")
        self.answered += 1
        self.failed += has_failed(answer)

    def _write(self, data: Mapping[str, Any], before: bytes = b"") -> None:
        # UTF-8 has no half characters (\ud800 to \udfff), so they are written as JSON escapes.
        text = json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
        try:
            self.file.write(before + text + b"\n")
            self.file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {str(self.path)!r}: {error.strerror}.") from error

    def finish(self) -> None:
        """Write all answers to OUT, and remove the journal.

        Raises:
            OutputExistsError: if OUT appeared during the run and may not be replaced. The journal stays.
            CheckpointError: if the disk is full. The journal stays.
        """
        self.file.seek(0)
        self.file.readline()
        remove_leftovers(self.out.resolve())  # the lock of the journal keeps other runs with this output away
        with replacing_file(self.out, overwrite=self.replaces) as out:
            for stored in self.file:
                out.write(stored.split(b" ", 1)[1].decode("utf-8"))
        self.close(remove=True)

    def close(self, *, remove: bool = False) -> None:
        """Close the file; `remove` deletes it, too."""
        if remove:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self.file.close()


def _parse(text: bytes) -> dict[str, Any]:
    """Parse an object of the journal; an empty one of a text that vlm did not write."""
    try:
        found = parse_json(text.decode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
