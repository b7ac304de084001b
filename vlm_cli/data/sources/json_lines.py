"""JSON lines: one object per line, in files, a pipe or standard input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlm_cli.data.inputs import read_lines
from vlm_cli.data.jsonl import RecordError, parse_object
from vlm_cli.data.sources.base import Row, Source
from vlm_cli.data.sources.files import FileSource, reading_shard

__all__ = ["JsonLines", "PipedLines"]


class JsonLines(FileSource):
    """Files of JSON lines."""

    kind = "JSON lines"

    def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
        first, begin = known or (1, 0)
        with reading_shard(self, shard), self.files.path(shard).open("rb") as file:
            file.seek(begin)
            yield from _parse(file, self.shards[shard], start, first, begin, self.keeps_lines)


class PipedLines(Source):
    """JSON lines that can be read once."""

    kind = "JSON lines"

    def __init__(self, path: Path) -> None:
        self.name, self.path, self.folder = str(path), path, Path()
        self.shards = ["standard input" if self.name == "-" else path.name]
        self._digest = ""

    def rows(self, shard: int, start: int = 0, known: tuple[int, int] | None = None) -> Iterator[Row]:
        yield from _parse(self._hashed(), self.shards[shard], start, keeps_lines=self.keeps_lines)

    def _hashed(self) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for raw in read_lines(self.path):
            digest.update(raw)
            yield raw
        self._digest = digest.hexdigest()

    def digest(self) -> str:
        """Return the hash of what was read; empty before the end of the pipe."""
        return self._digest


def _parse(
    lines: Iterable[bytes], shard: str, start: int, first: int = 1, begin: int = 0, keeps_lines: bool = False
) -> Iterator[Row]:
    """Yield the rows of lines whose number is above `start`. The first line has the number `first`, and `begin`."""
    for number, raw in enumerate(lines, start=first):
        place, begin = begin, begin + len(raw)
        if number <= start or not raw.strip():
            continue
        kept = raw if keeps_lines else b""
        try:
            yield Row(shard, number, parse_object(raw), unit="line", begin=place, raw=kept)
        except RecordError as error:
            yield Row(shard, number, problem=str(error), unit="line", begin=place, raw=kept)
