"""The order in which a model learns records: one long stream, which is the same for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

__all__ = ["StreamSampler"]

GROUP = 50  # batches within which the sampler sorts records by size


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
    """

    def __init__(
        self, num_records: int, num_drawn: int, *, seed: int, batch_size: int, sizes: np.ndarray | None = None
    ) -> None:
        self.num_records, self.num_drawn = num_records, num_drawn
        self.seed, self.batch_size, self.sizes = seed, batch_size, sizes

    def __len__(self) -> int:
        return self.num_drawn

    def __iter__(self) -> Iterator[int]:
        chunk, number, left = GROUP * self.batch_size, 0, self.num_drawn
        waiting = np.empty(0, np.int64)
        passes = 0
        while left:
            while len(waiting) < min(chunk, left):
                draw = np.random.default_rng([self.seed, passes]).permutation(self.num_records)
                waiting, passes = np.concatenate([waiting, draw]), passes + 1
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
