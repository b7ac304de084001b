"""Records that a model learns while they are read: for data that does not fit into memory, or that is far away.

    RowStream ──rows of this process──▶ workers: tokens and pixels ──▶ sequences ──packed or not──▶ batches

The main process makes the order and the batches, so both are the same for any number of workers. The workers read
ahead; the state is that of the rows that were learned.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlm_cli.data.skipped import SkippedRows
from vlm_cli.data.sources import Source
from vlm_cli.data.stream import Drawn, ReadAhead
from vlm_cli.errors import DataError
from vlm_cli.modeling.learned import IGNORED
from vlm_cli.printable import count_of
from vlm_cli.training.dataset import Collator
from vlm_cli.training.packing import join_items, pack
from vlm_cli.training.row_reader import PreparedRow, RowReader, begin_worker

__all__ = ["StreamPlan", "StreamedRecord", "StreamedRecords"]

_PACK_WINDOW = 64  # records among which those are chosen that fill a row; they wait with their pixels
_MOST_BAD = 1_000  # rows in a row that cannot be used, after which the run gives up


@dataclass(frozen=True)
class StreamedRecord:
    """What a batch tells of a record: its name for messages, and its number of images and frames."""

    name: str
    num_images: int


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """How a stream becomes batches.

    Attributes:
        sources: where the rows come from.
        weights: how often each source is drawn, in relation to the others; None for passes over all of them.
        buffer: number of rows among which the next one is drawn.
        seed: equal seeds give equal streams.
        batch_size: rows of a batch.
        pack: positions of a packed row; None leaves each sequence a row of its own.
        skips: leave out rows that cannot be used; otherwise they are errors.
        rank: number of this process.
        num_processes: among which the rows are dealt.
        num_records: that all sources together hold; None if nobody has counted them.
    """

    sources: Sequence[Source]
    weights: Sequence[float] | None
    buffer: int
    seed: int
    batch_size: int
    pack: int | None = None
    skips: bool = False
    rank: int = 0
    num_processes: int = 1
    num_records: int | None = None

    def is_mine(self, number: int) -> bool:
        """Tell whether a row of the stream is this process's.

        The processes take turns after as many rows as a batch has, so that together they learn in a step what one
        process learns that has all their batches.
        """
        turn = number if self.pack is not None else number // self.batch_size
        return turn % self.num_processes == self.rank


class StreamedRecords:
    """The records of a stream, as the trainer learns them.

    Args:
        plan: how the stream becomes batches.
        reader: makes tokens and pixels.
        collate: joins items to a batch.
    """

    def __init__(self, plan: StreamPlan, reader: RowReader, collate: Collator) -> None:
        self.plan, self.reader, self.collate = plan, reader, collate
        self.preprocessing = reader.images.preprocessing.describe()
        self.skipped = SkippedRows()
        self._start: dict[str, Any] | None = None  # the state that the run continues
        self._stream: ReadAhead | None = None
        self._used = 0  # number of the first row that was not made into sequences
        self._waiting: dict[tuple[int, int], None] = {}  # sequences in no batch yet: row and place in it, in order
        self._bad_in_a_row = 0
        self._learned: dict[str, Any] | None = None

    # -- what the trainer asks ------------------------------------------------------------------------------------

    def identity(self) -> str:
        """Return what differs between other records; checkpoints store it."""
        digests = "".join(source.digest() for source in self.plan.sources)
        return f"a stream ({hashlib.sha256(digests.encode()).hexdigest()[:12]})"

    def plan_identity(self) -> dict[str, Any]:
        """Return what must not change when the stream is continued, by option."""
        plan = self.plan
        found: dict[str, Any] = {"--shuffle-buffer": plan.buffer}
        if plan.weights is not None:
            found["weights"] = list(plan.weights)
        if plan.num_processes > 1:  # each has a stream of its own, dealt by batches
            found |= {"processes": plan.num_processes, "--batch-size": plan.batch_size}
        return found

    def describe_whole(self) -> str:
        """Say where the records come from."""
        names = ", ".join(f"{source.quoted} ({source.kind})" for source in self.plan.sources)
        known = "" if self.plan.num_records is None else f"{count_of(self.plan.num_records, 'record')}, "
        return f"a stream of {names} ({known}shuffle buffer of {count_of(self.plan.buffer, 'row')})"

    def count_images(self, records: Sequence[StreamedRecord]) -> int:
        """Count the images of records, each frame of a clip as one."""
        return sum(record.num_images for record in records)

    def describe(self, records: Sequence[StreamedRecord], most: int = 8) -> str:
        """Name records for a message."""
        more = f" and {len(records) - most} more" if len(records) > most else ""
        return ", ".join(record.name for record in records[:most]) + more

    @property
    def num_records(self) -> int | None:
        """Number of records in a pass; None if nobody has counted them, or they are packed."""
        return self.plan.num_records if self.plan.pack is None else None

    @property
    def num_read(self) -> int:
        """Number of rows of the stream that were learned or skipped, by all processes together."""
        return self._used

    # -- batches --------------------------------------------------------------------------------------------------

    def batches(self, num_workers: int, *, pin: bool = False) -> Iterator[dict[str, Any]]:
        """Yield batches without end.

        Args:
            num_workers: processes that make tokens and pixels.
            pin: let the batches lie in memory from which a GPU copies quickly.

        Raises:
            DataError: if a source cannot be read, or a row cannot be used that may not be skipped.
        """
        plan, start = self.plan, self._start
        self._stream = ReadAhead(
            plan.sources,
            plan.weights,
            buffer=plan.buffer,
            seed=plan.seed,
            state=None if start is None else start["stream"],
        )
        self.mark_learned()
        items = self._items(self._prepared_rows(num_workers))
        if plan.pack is not None:
            packs = pack(items, plan.pack, size=lambda item: item["positions"], window=_PACK_WINDOW)
            rows: Iterator[list[dict[str, Any]]] = packs
        else:
            rows = ([item] for item in items)
        while True:
            taken = list(islice(rows, plan.batch_size))
            for item in (item for row in taken for item in row):
                del self._waiting[item["key"]]
            batch = self.collate([row[0] if plan.pack is None else join_items(row) for row in taken])
            yield {key: _pin(x) for key, x in batch.items()} if pin else batch

    def _prepared_rows(self, num_workers: int) -> Iterator[PreparedRow]:
        ahead = max(2, -(-2 * self.plan.batch_size // num_workers)) if num_workers else None
        # A copy of this process has the model and the tokenizer at once; otherwise they would have to travel.
        method = "fork" if num_workers and "fork" in multiprocessing.get_all_start_methods() else None
        loader = DataLoader(
            self.reader,
            batch_size=None,
            sampler=self._own_rows(),
            collate_fn=cast(Any, _as_it_is),
            num_workers=num_workers,
            prefetch_factor=ahead,
            worker_init_fn=begin_worker if num_workers else None,
            multiprocessing_context=method,
            generator=torch.Generator(),  # otherwise, to begin draws a number, which a resumed run would lack
        )
        for prepared in loader:
            yield prepared.unpack()

    def _own_rows(self) -> Iterator[Drawn]:
        assert self._stream is not None
        return (drawn for drawn in self._stream if self.plan.is_mine(drawn.number))

    def _items(self, rows: Iterator[PreparedRow]) -> Iterator[dict[str, Any]]:
        """Yield the sequences of rows as items for the collator; of rows before a resume, those that waited."""
        before = 0 if self._start is None else self._start["stream"]["used"]
        waited = set(self._waiting)
        for row in rows:
            self._used = max(self._used, row.number + 1)
            if row.problem is not None:
                self._skip(row)
                continue
            self._bad_in_a_row = 0
            items = {(row.number, part): _make_item(row, part) for part in range(len(row.sequences))}
            if row.number < before:
                items = {key: item for key, item in items.items() if key in waited}
            self._waiting |= dict.fromkeys(items)
            for key, item in items.items():
                yield item | {"key": key}

    def _skip(self, row: PreparedRow) -> None:
        """Leave out a row that cannot be used.

        Raises:
            DataError: if it may not be left out, or if nothing else comes.
        """
        if not (self.plan.skips or row.is_left_out):
            raise DataError(f"{row.name}: {row.problem}")
        assert row.problem is not None
        self.skipped.add(row.name, row.problem)
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= _MOST_BAD:
            raise DataError(
                f"{_MOST_BAD:,} rows one after the other cannot be used. The last is {row.name}: {row.problem}"
            )

    # -- state ----------------------------------------------------------------------------------------------------

    def mark_learned(self) -> None:
        """Note that every batch so far is learned; `state` then is the state at this moment."""
        assert self._stream is not None
        waiting = list(self._waiting)
        if self._learned is None and self._start is not None:  # nothing is read yet
            self._learned = self._start
            return
        self._learned = {
            "stream": self._stream.state(self._used, sorted({number for number, _ in waiting})),
            "waiting": [list(key) for key in waiting],
            "skipped": self.skipped.state(),
        }

    def state(self) -> dict[str, Any]:
        """Return, as JSON has it, the state at the last `mark_learned`."""
        assert self._learned is not None
        return self._learned

    def continue_from(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._start, self._used = state, state["stream"]["used"]
        self._waiting = {(number, part): None for number, part in state["waiting"]}
        self.skipped = SkippedRows.continued(state["skipped"])


def _make_item(row: PreparedRow, part: int) -> dict[str, Any]:
    """Make an item, as `RecordDataset` has it, of a sequence of a row."""
    sequence = row.sequences[part]
    ids = torch.from_numpy(sequence.ids).long()
    return {
        "index": StreamedRecord(row.name, sequence.num_frames),
        "ids": ids,
        "labels": ids.masked_fill(torch.from_numpy(~sequence.is_target), IGNORED),
        "pixels": row.media[: len(sequence.media)],
        "notes": row.notes if part == 0 else (),
        "positions": sequence.positions,
    }


def _as_it_is(row: PreparedRow) -> PreparedRow:
    return row


def _pin(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, Tensor) else value
