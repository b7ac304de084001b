"""What every source of rows offers, and what a row is."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

from vlm_cli.data.jsonl import RecordError
from vlm_cli.media.sources import INSIDE

__all__ = ["Embedded", "Row", "Source", "absent"]


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        shard: the name of the file that holds it, for messages.
        number: of the row in its shard, from 1; of a file of lines, the number of the line.
        data: its values as JSON has them; a picture or a clip that the file holds is an `Embedded`.
        problem: why the row cannot be read, as a sentence; `data` is then empty.
        unit: what messages call a row of this source: "line 7", "row 7".
        begin: bytes of the shard before the row; None where these do not help to find it.
        raw: the line itself, if the source keeps lines; empty otherwise.
    """

    shard: str
    number: int
    data: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    unit: str = "row"
    begin: int | None = None
    raw: bytes = field(default=b"", repr=False)

    @property
    def place(self) -> str:
        """Where the row stands, for a message: `line 7 of a.jsonl`."""
        return f"{self.unit} {self.number} of {self.shard}"

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of the line, without its end, or of the values and the pictures among them."""
        text = self.raw.strip() or json.dumps([self.problem, self.data], default=_fingerprint).encode()
        return hashlib.sha256(text).hexdigest()[:32]


@dataclass(frozen=True)
class Embedded:
    """A picture or a clip whose bytes a shard holds.

    Attributes:
        reference: a `Medium`'s source, such as `inside:SHARD#7/image/0`; `Source.bytes_of` finds the bytes again.
        data: the bytes of the file.
    """

    reference: str
    data: bytes = field(repr=False)

    @staticmethod
    def refer(shard: str, number: int, *where: str | int) -> str:
        """Make the reference of a value: its shard, the number of its row, and the keys that lead to it.

        >>> Embedded.refer("train-0.parquet", 7, "images", 0)
        'inside:train-0.parquet#7/images/0'
        """
        return f"{INSIDE}{quote(shard)}#{number}/{'/'.join(quote(str(x), safe='+') for x in where)}"

    @staticmethod
    def parse(reference: str) -> tuple[str, int, list[str]]:
        """Return the shard, the number of the row and the keys of a reference.

        >>> Embedded.parse("inside:train-0.parquet#7/images/0")
        ('train-0.parquet', 7, ['images', '0'])

        Raises:
            RecordError: if it is no reference.
        """
        found = re.fullmatch(rf"{INSIDE}([^#?]+)#([1-9]\d{{0,15}})/([^#?]+)", reference)
        if found is None:
            raise RecordError(f"{reference!r} is no picture inside a data set.")
        return unquote(found[1]), int(found[2]), [unquote(x) for x in found[3].split("/")]


def _fingerprint(value: Embedded) -> list[str]:
    return [value.reference, hashlib.sha256(value.data).hexdigest()]


class Source(ABC):
    """Rows in one or more shards, which can be read in order from any row on.

    Attributes:
        name: what the user typed; `quoted` is for messages.
        kind: what the log calls the kind of the source.
        folder: where relative paths of pictures start.
        shards: the names of the shards, each of them once.
        detail: what else the log tells, such as the split; empty for nothing.
        keeps_lines: whether a row of a file of lines keeps its line, for whoever compares files byte by byte.
    """

    kind: ClassVar[str]
    keeps_lines: bool = False
    detail: str = ""
    name: str
    folder: Path
    shards: Sequence[str]

    @property
    def quoted(self) -> str:
        """The name of the source, for messages."""
        return "standard input" if self.name == "-" else repr(self.name)

    @abstractmethod
    def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
        """Yield the rows of a shard whose number is above `start`, in order.

        A row that cannot be read has a `problem`, and the rows behind it follow.

        Args:
            shard: index in `shards`.
            start: the number of the last row that is left out; 0 for all rows.
            known: number and `begin` of a row that is not above `start + 1`, from which the shard is read; None reads
                it from its beginning, unless its format has another way.

        Raises:
            DataError: if the shard cannot be read, or not to its end.
        """

    def all_rows(self) -> Iterator[Row]:
        """Yield the rows of all shards, in order.

        Raises:
            DataError: as in `rows`.
        """
        for shard in range(len(self.shards)):
            yield from self.rows(shard)

    def bytes_of(self, reference: str) -> bytes:
        """Return the bytes of an `Embedded` by its reference, at any time and in any process.

        Raises:
            RecordError: if this source holds nothing under the reference.
            DataError: if the shard cannot be read, or is gone.
        """
        raise absent(self, reference)

    @abstractmethod
    def digest(self) -> str:
        """Return a hash that differs when the rows differ: a run is resumed only on the same rows.

        Raises:
            DataError: if a shard cannot be read.
        """


def absent(source: Source, reference: str) -> RecordError:
    """Make the error for a reference under which a source holds nothing."""
    return RecordError(f"{source.quoted} holds no picture {reference!r}.")
