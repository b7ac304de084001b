"""A JSON file that is one array of objects, of any length: each object is parsed once, and then forgotten."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from vlm_cli.data.jsonl import RecordError, describe_type
from vlm_cli.data.sources.base import Row
from vlm_cli.data.sources.files import FileSource, reading_shard
from vlm_cli.plain_data import JSON_BYTES

__all__ = ["JsonArray"]

_STEP = 1 << 20  # bytes per read
_BLANK = " \t\r\n"
_MARK = "\ufeff"  # at the start of a file in UTF-8 that some programs write


class JsonArray(FileSource):
    """Files that hold one JSON array each."""

    kind = "JSON array"

    def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
        name = self.shards[shard]
        first, begin = known or (1, 0)
        with reading_shard(self, shard), self.files.path(shard).open("rb") as file:
            elements = _Elements(file, begin)
            number = first - 1
            try:
                for number, value in enumerate(elements, start=first):
                    if number <= start:
                        continue
                    if isinstance(value, dict):
                        yield Row(name, number, value, unit="element", begin=elements.begin)
                    else:
                        problem = f"not a record: expected an object, {{…}}, got {describe_type(value)}."
                        yield Row(name, number, problem=problem, unit="element", begin=elements.begin)
            except RecordError as error:
                yield Row(name, number + 1, problem=f"{error} Nothing behind it can be read.", unit="element")


class _Elements:
    """The elements of an array, one after the other.

    Args:
        file: open for bytes.
        begin: bytes before the first element that is wanted; 0 to begin with the array.

    Attributes:
        begin: bytes of the file before the last element.
    """

    def __init__(self, file: BinaryIO, begin: int = 0) -> None:
        self.file, self.begin, self.is_inside = file, begin, begin > 0
        file.seek(begin)
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.place, self.is_whole = "", 0, False
        self._counted, self._bytes = 0, begin  # characters of the text, and bytes of the file before them
        self._scan = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[Any]:
        """Yield the elements.

        Raises:
            RecordError: where the array is no JSON, or an element is too large.
        """
        if not self.is_inside:
            if self._next() == _MARK:
                self.place += 1
            self._expect("[")
        if self._next() == "]" and not self.is_inside:
            self.place += 1
        else:
            yield self._element()
            while self._next() == ",":
                self.place += 1
                self._next()
                yield self._element()
            self._expect("]")
        if self._next():
            raise RecordError(f"not JSON: {self.text[self.place]!r} stands behind the end of the array.")

    def _next(self) -> str:
        """Go to the next character that is not blank; return it, or nothing at the end of the file."""
        while True:
            while self.place < len(self.text):
                if self.text[self.place] not in _BLANK:
                    return self.text[self.place]
                self.place += 1
            if not self._read(_STEP):
                return ""

    def _expect(self, character: str) -> None:
        if (found := self._next()) != character:
            what = f"got {found!r}." if found else "and the file ends. Is it cut short?"
            raise RecordError(f"not JSON: {character!r} is expected, {what}")
        self.place += 1

    def _element(self) -> Any:
        """Parse one element. What follows it must be known, since the text may end within a number."""
        self.begin = self._count_bytes()
        while True:
            try:
                value, end = self._scan(self.text, self.place)
            except json.JSONDecodeError as error:
                problem = f"not JSON: {error.msg} at character {error.pos - self.place + 1} of the element."
                is_open = error.pos >= len(self.text) - 8 or error.msg.startswith("Unterminated string")
            except ValueError as error:
                raise RecordError(f"not JSON: {error}.") from None
            except RecursionError:
                raise RecordError("not a record: it is nested too deeply.") from None
            else:
                if end < len(self.text) or not self._read(_STEP):
                    self.place = end
                    return value
                continue
            if len(self.text) - self.place > JSON_BYTES:
                raise RecordError(f"not a record: it is larger than {JSON_BYTES:,} characters.")
            # Twice as much each time, so that a long element is parsed a few times, and not at each step again.
            if not is_open or not self._read(max(_STEP, len(self.text) - self.place)):
                raise RecordError(problem)

    def _count_bytes(self) -> int:
        """Return the bytes of the file before the next character."""
        self._bytes += len(self.text[self._counted : self.place].encode())
        self._counted = self.place
        return self._bytes

    def _read(self, most: int) -> bool:
        """Append to the text, from which what was parsed is removed; tell whether there was anything left to read."""
        if self.is_whole:
            return False
        raw = self.file.read(most)
        self.is_whole = not raw
        try:
            more = self.decode(raw, self.is_whole)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise RecordError(f"not UTF-8 text: it has the byte {byte:#04x}. Save it as UTF-8.") from None
        self._count_bytes()
        self.text, self.place, self._counted = self.text[self.place :] + more, 0, 0
        return bool(raw)
