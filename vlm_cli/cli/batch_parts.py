"""The input of a run cut into pieces, and its output, which has a file of answers for each piece.

    OUT/run.json                 settings, the input's hash, and rows of a piece: a run with others does not resume
    OUT/part-00000-00000001.jsonl    answers to the piece that begins at row 1 of the first shard
    OUT/part-00000-00001001.jsonl

OUT is a folder, or a place in an object store. A part appears whole or not at all, under a name that its piece alone
has. So whoever answers a piece again writes the same file, and a run that was killed goes on with the pieces that have
no part.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vlm_cli.cli.part_store import PartStore, find_store
from vlm_cli.data.sources import Row, Source
from vlm_cli.errors import OutputExistsError, UsageError
from vlm_cli.plain_data import parse_json
from vlm_cli.resume import settings_diff

__all__ = ["Parts", "Piece", "cut"]

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Piece:
    """Rows of one shard that follow each other.

    Attributes:
        shard: index of the shard.
        first: number of its first row.
        begin: bytes of the shard before that row; None where these do not help to find it.
        count: rows.
    """

    shard: int
    first: int
    begin: int | None
    count: int

    @property
    def name(self) -> str:
        """What the name of its file of answers begins with."""
        return f"part-{self.shard:05}-{self.first:08}"

    def rows(self, source: Source) -> Iterator[Row]:
        """Read the rows again, without those before them if the source can."""
        known = None if self.begin is None else (self.first, self.begin)
        return islice(source.rows(self.shard, self.first - 1, known), self.count)


def cut(source: Source, rows_each: int) -> Iterator[Piece]:
    """Cut a source into pieces, in order; none reaches over the end of a shard.

    Raises:
        DataError: if a shard cannot be read.
    """
    for shard in range(len(source.shards)):
        rows = source.rows(shard)
        while first := next(rows, None):
            yield Piece(shard, first.number, first.begin, 1 + sum(1 for _ in islice(rows, rows_each - 1)))


@dataclass(frozen=True)
class Parts:
    """The output of a run.

    Attributes:
        store: where its files are.
        as_parquet: whether parts are Parquet, and not JSON lines.
    """

    store: PartStore
    as_parquet: bool = False

    @classmethod
    def open(cls, output: str, settings: Mapping[str, Any], *, as_parquet: bool, overwrite: bool) -> Parts:
        """Begin an output, or open the one that an unfinished run with the same settings left.

        Raises:
            OutputExistsError: if there is something else.
            UsageError: if the unfinished run had other settings; the message names them.
        """
        store = find_store(output)
        parts = cls(store, as_parquet)
        if store.exists():
            found = parse_json(store.read(RUN_FILE).decode()) if RUN_FILE in store.names() else None
            if not isinstance(found, dict) or not isinstance(found.get("vlm_batch_settings"), dict):
                raise OutputExistsError(
                    f"{store.name!r} exists and holds no answers of `vlm batch --engine ray`. Choose another --output."
                )
            if not overwrite:
                if differences := settings_diff(found["vlm_batch_settings"], settings):
                    raise UsageError(
                        f"{store.name!r} holds answers of a run with other settings:\n{differences}\nGive the same "
                        "settings to go on with it, or add --overwrite to discard its answers and start again."
                    )
                return parts
            for name in store.names():
                if name.startswith("part-"):
                    store.remove(name)
        store.write(RUN_FILE, json.dumps({"vlm_batch_settings": settings}, indent=2).encode())
        return parts

    def name_of(self, piece: Piece) -> str:
        """Return the name of the file of answers of a piece."""
        return f"{piece.name}.{'parquet' if self.as_parquet else 'jsonl'}"

    def missing(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces without a file of answers."""
        there = self.store.names()
        return [piece for piece in pieces if self.name_of(piece) not in there]

    def write(self, piece: Piece, answers: Iterator[Mapping[str, Any]]) -> None:
        """Write the answers of a piece, whole or not at all."""
        if self.as_parquet:
            content = _as_parquet(piece, answers)
        else:
            # UTF-8 has no half characters (\ud800 to \udfff), so they are written as JSON escapes.
            lines = (json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n" for answer in answers)
            content = b"".join(line.encode("utf-8", "backslashreplace") for line in lines)
        self.store.write(self.name_of(piece), content)

    def count_failed(self, piece: Piece) -> int:
        """Count the rows of a written part that could not be answered."""
        content = self.store.read(self.name_of(piece))
        if self.as_parquet:
            import pyarrow.parquet

            column = pyarrow.parquet.read_table(io.BytesIO(content), columns=["error"]).column("error")
            return len(column) - int(column.null_count)
        from vlm_cli.generation.journal import has_failed

        return sum(has_failed(parse_json(line.decode())) for line in content.split(b"\n") if line)


def _as_parquet(piece: Piece, answers: Iterator[Mapping[str, Any]]) -> bytes:
    """Return a table whose columns every run has; `row` is the line that JSON lines would have."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "shard": piece.shard,
            "id": None if answer.get("id") is None else str(answer["id"]),
            "text": answer.get("text"),
            "error": answer.get("error"),
            "row": json.dumps(answer, allow_nan=False),
        }
        for answer in answers
    ]
    kinds = [("shard", pyarrow.int32()), *((name, pyarrow.string()) for name in ("id", "text", "error", "row"))]
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(kinds)), written)
    return written.getvalue()
