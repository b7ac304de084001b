"""Tables of tab-separated values with pictures as base64 in them, as MMBench and others are published."""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.sources.base import Embedded, Row, absent
from vlm_cli.data.sources.files import FileSource, name_shard, reading_shard
from vlm_cli.errors import DataError

__all__ = ["TabTables", "is_tab_table"]

MOST_CHARACTERS = 128 << 20  # of a cell
_PICTURE = "image"
_INDEX = "index"
_SHORT = 64  # characters up to which a cell of pictures names the row that holds the picture


def is_tab_table(head: bytes) -> bool:
    """Tell from the first bytes of a file whether it is a table: its first line names a question and other columns."""
    line = head.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].strip(b"\r")
    return b"\t" in line and b"question" in line.split(b"\t") and not line.startswith((b"{", b"["))


class TabTables(FileSource):
    """Files of tab-separated values, the names of the columns in the first line."""

    kind = "TSV"

    def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
        name = self.shards[shard]
        places: dict[str, tuple[int, int]] | None = None
        for number, offset, values in self._read(shard):
            if number <= start:
                continue
            try:
                cell = values.get(_PICTURE) or ""
                if 0 < len(cell) <= _SHORT and cell.isdecimal():
                    places = places or self._places(shard)
                    values[_PICTURE] = self._shared(places, cell, shard)
                elif cell:
                    values[_PICTURE] = _decode(cell, name, number, offset)
            except RecordError as error:
                yield Row(name, number, problem=str(error))
                continue
            yield Row(name, number, values)

    def _shared(self, places: dict[str, tuple[int, int]], index: str, shard: int) -> Embedded:
        """Return the picture of another row."""
        if index not in places:
            raise RecordError(f'"{_PICTURE}" names the row with the index {index}, which holds no picture.')
        number, offset = places[index]
        reference = Embedded.refer(self.shards[shard], number, _PICTURE, offset)
        return Embedded(reference, self.bytes_of(reference))

    def _places(self, shard: int) -> dict[str, tuple[int, int]]:
        """Return the number and the place of each row that holds a picture, by its index."""
        rows = ((number, offset, x) for number, offset, x in self._read(shard) if len(x.get(_PICTURE) or "") > _SHORT)
        return {x.get(_INDEX, ""): (number, offset) for number, offset, x in rows}

    def _read(self, shard: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield the number of each row, the bytes before it, and its values by column."""
        with reading_shard(self, shard), self.files.path(shard).open("rb") as file:
            lines = _Lines(file)
            columns: list[str] = []
            number = 0
            while True:
                place = lines.place
                try:
                    cells = _next_row(lines)
                except (csv.Error, UnicodeDecodeError) as error:
                    where = f"row {number + 1} of {name_shard(self, shard)}"
                    raise DataError(f"{where} cannot be read: {error}. Get the file again.") from None
                if cells is None:
                    return
                if not columns:
                    columns = cells
                elif cells:
                    number += 1
                    yield number, place, dict(zip(columns, cells, strict=False))

    def bytes_of(self, reference: str) -> bytes:
        name, number, where = Embedded.parse(reference)
        if name not in self.shards or len(where) != 2 or not where[1].isdecimal():
            raise absent(self, reference)
        shard = self.shards.index(name)
        with reading_shard(self, shard), self.files.path(shard).open("rb") as file:
            try:
                columns = _next_row(_Lines(file)) or []
                file.seek(int(where[1]))
                cells = _next_row(_Lines(file)) or []
            except (csv.Error, UnicodeDecodeError):
                raise DataError(f"{name_shard(self, shard)} has changed since it was opened.") from None
        cell = dict(zip(columns, cells, strict=False)).get(where[0])
        if cell is None:
            raise absent(self, reference)
        return _decode(cell, name, number, int(where[1])).data


class _Lines:
    """The lines of a file as text, and the bytes before the next one."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.place = file, file.tell()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self.file.readline(MOST_CHARACTERS)
        if not raw:
            raise StopIteration
        start = 3 if self.place == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
        self.place += len(raw)
        return raw[start:].decode("utf-8")


def _next_row(lines: _Lines) -> list[str] | None:
    """Return the cells of the next row; None at the end."""
    before = csv.field_size_limit(MOST_CHARACTERS)
    try:
        return next(csv.reader(lines, delimiter="\t"), None)
    finally:
        csv.field_size_limit(before)


def _decode(cell: str, name: str, number: int, offset: int) -> Embedded | Any:
    """Return a picture in base64; a cell that is none stays a text, the name of a file.

    Raises:
        RecordError: if it is cut short.
    """
    if len(cell) <= _SHORT or Path(cell).suffix:
        return cell
    try:
        data = base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError):
        raise RecordError(f'"{_PICTURE}" is no whole base64: {len(cell):,} characters.') from None
    return Embedded(Embedded.refer(name, number, _PICTURE, offset), data)
