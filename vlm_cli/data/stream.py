"""One endless, shuffled stream of the rows of several sources, which continues exactly where it was left.

    sources ──drawn by weight──▶ rows, shard after shard ──▶ buffer of N rows ──drawn at random──▶ stream
              shards in an order of their own in each pass

The stream depends on the sources, the weights, the size of the buffer and the seed alone: not on how many processes
read it, nor on how far they read ahead. Its state names the rows in the buffer by their places, so that a state is
small, and a stream that continues reads these rows again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlm_cli.data.sources.base import Row, Source
from vlm_cli.errors import DataError

__all__ = ["Drawn", "Place", "ReadAhead", "RowStream"]

_NEAR = 256  # rows; to read on is quicker than to open the shard again
_EVERY = 256  # rows between two states that a stream remembers


class Place(NamedTuple):
    """Where a row stands.

    Attributes:
        source: index of the source.
        epoch: number of passes over the source before this one.
        shard: index of the shard in the source.
        row: number of the row in the shard, from 1.
        begin: bytes of the shard before the row, if that helps to find it.
    """

    source: int
    epoch: int
    shard: int
    row: int
    begin: int | None = None


@dataclass(frozen=True)
class Drawn:
    """A row of the stream.

    Attributes:
        number: of the row in the stream, from 0.
        place: where it stands in its source.
        row: what it holds.
    """

    number: int
    place: Place
    row: Row


class RowStream(Iterator[Drawn]):
    """The stream. In each pass, the shards of a source have another order.

    Args:
        sources: where the rows come from.
        weights: for each source, how often it is drawn, in relation to the others, and it begins again when it ends.
            None for passes over all sources, each of which shows each row once: the next source is any that has rows
            left in the pass.
        buffer: number of rows among which the next one is drawn; at most so many rows are in memory.
        seed: equal seeds give equal streams.
        state: of the stream that this one continues; None to begin.

    Raises:
        DataError: if a source cannot be read, or holds no row.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        *,
        buffer: int,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.size = buffer
        self._readers = [_Reader(source, i, seed) for i, source in enumerate(sources)]
        self._bounds = None if weights is None else np.cumsum(np.asarray(weights, float)) / np.sum(weights)
        self._random = np.random.PCG64([seed, len(sources)])
        self._buffer: list[tuple[Place, Row]] = []
        self.number = 0  # of the next row
        if state is not None:
            self._restore(state)

    def __next__(self) -> Drawn:
        while len(self._buffer) < self.size:
            self._buffer.append(self._read())
        slot = int(self._uniform() * self.size)
        place, row = self._buffer[slot]
        self._buffer[slot] = self._buffer[-1]
        self._buffer.pop()
        self.number += 1
        return Drawn(self.number - 1, place, row)

    def _read(self) -> tuple[Place, Row]:
        if self._bounds is not None:
            chosen = int(np.searchsorted(self._bounds, self._uniform(), side="right"))
            return self._readers[chosen].read()
        while True:
            epoch = min(reader.epoch for reader in self._readers)
            behind = [reader for reader in self._readers if reader.epoch == epoch]
            found = behind[int(self._uniform() * len(behind))].read_in_pass()
            if found is not None:
                return found

    def _uniform(self) -> float:
        """Draw from [0, 1). Raw draws are the same in each version of NumPy."""
        return float(int(self._random.random_raw()) >> 11) * 2.0**-53

    # -- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return, as JSON has it, where the stream is."""
        return {
            "number": self.number,
            "random": self._random.state["state"],
            "readers": [[reader.epoch, reader.turn, *_known(reader.row, reader.begin)] for reader in self._readers],
            "buffer": [[*place[:3], *_known(place.row, place.begin)] for place, _ in self._buffer],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.number = state["number"]
        self._random.state = {**self._random.state, "state": state["random"]}
        for reader, place in zip(self._readers, state["readers"], strict=True):
            reader.continue_at(*place)
        places = [Place(*place) for place in state["buffer"]]
        rows = self._read_again(places)
        self._buffer = [(place, rows[place]) for place in places]

    def _read_again(self, places: Sequence[Place]) -> dict[Place, Row]:
        """Read rows of known places, those of a shard in one go."""
        found: dict[Place, Row] = {}
        by_shard: dict[tuple[int, int], dict[int, list[Place]]] = {}
        for place in sorted(places, key=lambda place: place.row):
            by_shard.setdefault((place.source, place.shard), {}).setdefault(place.row, []).append(place)
        for (source, shard), wanted in by_shard.items():
            begins = {number: some[0].begin for number, some in wanted.items()}
            for row in _rows_at(self._readers[source].source, shard, begins):
                found.update(dict.fromkeys(wanted[row.number], row))
        return found


class _Reader:
    """The rows of one source, pass after pass.

    Attributes:
        epoch: number of passes that are done.
        turn: number of shards that are done in this pass.
        row: number of the last row that was read in this shard; 0 before the first.
        begin: bytes of the shard before that row, if that helps to find it.
    """

    def __init__(self, source: Source, index: int, seed: int) -> None:
        self.source, self.index, self.seed = source, index, seed
        self.epoch, self.turn, self.row = 0, 0, 0
        self.begin: int | None = None
        self._rows: Iterator[Row] | None = None
        self._order: tuple[int, Sequence[int]] = (-1, ())  # a pass, and the order of its shards
        self._gave_rows = False  # whether the pass has given a row

    def read(self) -> tuple[Place, Row]:
        """Return the next row and its place."""
        while (found := self.read_in_pass()) is None:
            pass
        return found

    def read_in_pass(self) -> tuple[Place, Row] | None:
        """Return the next row and its place; None if a pass ends here."""
        epoch = self.epoch
        while self.epoch == epoch:
            shard = self._shard()
            if self._rows is None:
                self._rows = self.source.rows(shard, self.row, _find(self.row, self.begin))
            row = next(self._rows, None)
            if row is not None:
                self.row, self.begin = row.number, row.begin
                self._gave_rows = True
                return Place(self.index, self.epoch, shard, self.row, self.begin), row
            self._end_shard()
        return None

    def _shard(self) -> int:
        """Return the index of the shard whose turn it is."""
        if self._order[0] != self.epoch:
            random = np.random.default_rng([self.seed, self.index, self.epoch])
            self._order = self.epoch, random.permutation(len(self.source.shards)).tolist()
        return self._order[1][self.turn]

    def _end_shard(self) -> None:
        self._rows = None
        self.turn, self.row, self.begin = self.turn + 1, 0, None
        if self.turn < len(self.source.shards):
            return
        if not self._gave_rows:
            raise DataError(f"{self.source.quoted} holds no rows.")
        self.epoch, self.turn, self._gave_rows = self.epoch + 1, 0, False

    def continue_at(self, epoch: int, turn: int, row: int, begin: int | None = None) -> None:
        """Read on after a row, as the attributes say."""
        self.epoch, self.turn, self.row, self.begin = epoch, turn, row, begin
        self._gave_rows = True  # perhaps, in the shards before this one


def _known(row: int, begin: int | None) -> list[int]:
    """Return where a row stands in its shard, as a state has it. States of earlier versions have the number alone."""
    return [row] if begin is None else [row, begin]


def _find(row: int, begin: int | None) -> tuple[int, int] | None:
    return None if begin is None else (row, begin)


def _rows_at(source: Source, shard: int, wanted: Mapping[int, int | None]) -> Iterator[Row]:
    """Yield some rows of a shard.

    Args:
        source: of the shard.
        shard: its index.
        wanted: numbers of rows, rising, with the bytes before each.

    Raises:
        DataError: if the shard no longer has them.
    """
    rows: Iterator[Row] = iter(())
    at = -_NEAR  # number of the last row that was read
    for number, begin in wanted.items():
        if number - at > _NEAR:
            rows = source.rows(shard, number - 1, _find(number, begin))
        row = next((row for row in rows if row.number >= number), None)
        if row is None or row.number != number:
            raise DataError(
                f"row {number} of {source.shards[shard]!r} in {source.quoted} is gone, which the run had read."
            )
        at = number
        yield row


class ReadAhead(Iterator[Drawn]):
    """A stream that is read ahead of its use, and that tells its state at the rows that were used.

    Args:
        sources: as of `RowStream`.
        weights: as of `RowStream`.
        buffer: as of `RowStream`.
        seed: as of `RowStream`.
        state: what `state` returned; None to begin.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        *,
        buffer: int,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        before = None if state is None else state["stream"]
        self._stream = RowStream(sources, weights, buffer=buffer, seed=seed, state=before)
        self._used: int = 0 if state is None else state["used"]
        self._waiting = frozenset(() if state is None else state["waiting"])
        self._states = [self._stream.state()]

    def __next__(self) -> Drawn:
        while True:
            drawn = next(self._stream)
            if self._stream.number % _EVERY == 0:
                self._states.append(self._stream.state())
            if drawn.number >= self._used or drawn.number in self._waiting:
                return drawn

    def state(self, used: int, waiting: Sequence[int] = ()) -> dict[str, Any]:
        """Return, as JSON has it, the state after some rows.

        Args:
            used: number of the first row that comes next.
            waiting: numbers of rows before it that are to come again.
        """
        first = min([used, *waiting])
        while len(self._states) > 1 and self._states[1]["number"] <= first:
            del self._states[0]
        return {"stream": self._states[0], "used": used, "waiting": list(waiting)}
