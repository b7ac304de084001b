"""The order in which records are learned: one long stream, the same however many processes share it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

__all__ = ["StreamSampler"]

GROUP = 50  # batches among which records of like size are brought together


class StreamSampler(Sampler[int]):
    """All records in random order, again and again, until so many are drawn.

    A batch may hold the end of one pass and the beginning of the next, so that every batch is whole.

    Args:
        num_records: how many there are.
        num_drawn: length of the stream.
        seed: the stream is a function of it.
        sizes: of the records, one row each, the most important size first; records of like size then come in the same
            batch. None leaves the order random.
        batch_size: records of a step, over all processes.
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
            yield from self._grouped(taken, number).tolist()
            left, number = left - len(taken), number + 1

    def _grouped(self, records: np.ndarray, number: int) -> np.ndarray:
        """Records of a chunk, batches of like size, in random order."""
        if self.sizes is None:
            return records
        order = records[np.lexsort(self.sizes[records].T[::-1])]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        shuffled = np.random.default_rng([self.seed, number, 1]).permutation(len(batches))
        return np.concatenate([batches[i] for i in shuffled])
