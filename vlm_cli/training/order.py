"""The order in which a model learns records: one long stream, which is the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

__all__ = ["Shares", "StreamSampler"]

GROUP = 50  # batches within which the sampler sorts records by size
_BLOCK = 1_024  # draws in which each source has its share, but for a record


@dataclass(frozen=True)
class Shares:
    """How often each of several sources is drawn.

    Attributes:
        counts: number of records of each source; those of the first stand before those of the second.
        weights: share of each source in what is drawn; they sum to 1.
    """

    counts: Sequence[int]
    weights: Sequence[float]


class StreamSampler(Sampler[int]):
    """Draw all records in random order, again and again, until the stream is long enough.

    A batch may hold the end of one pass and the start of the next, so that every batch is full.

    Args:
        num_records: number of records.
        num_drawn: length of the stream.
        seed: equal seeds give equal streams.
        sizes: int[num_records, sizes] of the records, the most important size first; a batch then holds records of
            similar sizes. None leaves the order random.
        batch_size: number of records in a step, over all processes.
        shares: how often each source is drawn, each in passes of its own; None draws every record once in a pass.
    """

    def __init__(
        self,
        num_records: int,
        num_drawn: int,
        *,
        seed: int,
        batch_size: int,
        sizes: np.ndarray | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.num_records, self.num_drawn = num_records, num_drawn
        self.seed, self.batch_size, self.sizes, self.shares = seed, batch_size, sizes, shares

    def __len__(self) -> int:
        return self.num_drawn

    def __iter__(self) -> Iterator[int]:
        chunk, number, left = GROUP * self.batch_size, 0, self.num_drawn
        waiting = np.empty(0, np.int64)
        draws = _passes(self.num_records, self.seed) if self.shares is None else _mixed(self.shares, self.seed)
        while left:
            while len(waiting) < min(chunk, left):
                waiting = np.concatenate([waiting, next(draws)])
            taken, waiting = waiting[: min(chunk, left)], waiting[min(chunk, left) :]
            yield from self._group_by_size(taken, number).tolist()
            left, number = left - len(taken), number + 1

    def _group_by_size(self, records: np.ndarray, number: int) -> np.ndarray:
        """Sort the records of a chunk into batches of similar sizes, and shuffle the batches."""
        if self.sizes is None:
            return records
        order = records[np.lexsort(self.sizes[records].T[::-1])]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        shuffled = np.random.default_rng([self.seed, number, 1]).permutation(len(batches))
        return np.concatenate([batches[i] for i in shuffled])


def _passes(num_records: int, *seed: int) -> Iterator[np.ndarray]:
    """Yield all records in random order, again and again."""
    number = 0
    while True:
        yield np.random.default_rng([*seed, number]).permutation(num_records)
        number += 1


def _mixed(shares: Shares, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks of records in which each source has its share."""
    firsts = np.cumsum([0, *shares.counts])
    passes = [_passes(count, seed, source, 2) for source, count in enumerate(shares.counts)]
    waiting = [np.empty(0, np.int64) for _ in shares.counts]
    borders = np.cumsum(shares.weights)[:-1]
    number = 0
    while True:
        random = np.random.default_rng([seed, number, 3, 0])
        # Evenly spread points, so that chance decides about single records and not about shares.
        points = (np.arange(_BLOCK) + random.random()) / _BLOCK
        sources = random.permutation(np.searchsorted(borders, points, side="right"))
        block = np.empty(_BLOCK, np.int64)
        for source in range(len(shares.counts)):
            wanted = np.flatnonzero(sources == source)
            while len(waiting[source]) < len(wanted):
                waiting[source] = np.concatenate([waiting[source], firsts[source] + next(passes[source])])
            block[wanted], waiting[source] = waiting[source][: len(wanted)], waiting[source][len(wanted) :]
        yield block
        number += 1
