"""Packing: short records stand one after the other in rows of one length, and do not see each other.

With a length of 10 and records of 7, 4, 3, 6 and 3 positions, and padding as `·`:

    one record a row     aaaaaaa        a row of each          packed     aaaaaaaccc
                         ···bbbb                                          bbbbdddddd
                         ····ccc                                          eee·······
                         ·dddddd
                         ····eee

The packs follow from the order of the records alone, so they are the same for any number of processes and for a run
that is resumed.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from vlm_cli.errors import UsageError
from vlm_cli.modeling.learned import IGNORED
from vlm_cli.modeling.packable import find_packing_problem
from vlm_cli.modeling.vlm import VLM
from vlm_cli.training.dataset import RecordDataset
from vlm_cli.training.order import Shares, StreamSampler

__all__ = ["PackedRecords", "PackedSampler", "check_packing", "count_packs", "join_items", "pack"]

WINDOW = 256  # records among which those are chosen that fill a row
_ENDLESS = 2**62

T = TypeVar("T")


def pack(items: Iterable[T], length: int, size: Callable[[T], int], window: int = WINDOW) -> Iterator[list[T]]:
    """Join items to packs whose sizes together are at most `length`. An item that is longer is a pack of its own.

    The item that has waited longest begins a pack, so that none waits for long. Of the items in the window, the largest
    that fits follows, until none fits.

    >>> list(pack([7, 4, 3, 6, 3], 10, size=int))
    [[7, 3], [4, 6], [3]]

    Args:
        items: in the order in which they are learned; the iterator may be endless.
        length: of a pack.
        size: of an item.
        window: items that wait at a time.
    """
    source = iter(enumerate(items))
    waiting: dict[int, T] = {}  # in order of arrival
    sizes: list[tuple[int, int]] = []  # size and minus the number of each waiting item, in order
    while True:
        for number, item in islice(source, window - len(waiting)):
            waiting[number] = item
            bisect.insort(sizes, (size(item), -number))
        if not waiting:
            return
        first = next(iter(waiting))
        chosen, left = [first], length - size(waiting[first])
        sizes.remove((size(waiting[first]), -first))
        while at := bisect.bisect(sizes, (left, 1)):  # the largest that fits, and of equals the first that came
            taken, number = sizes.pop(at - 1)
            chosen.append(-number)
            left -= taken
        yield [waiting.pop(number) for number in chosen]


def check_packing(model: VLM, *, bf16: bool) -> None:
    """Check that records can be packed for a model, on the CPU and before it trains.

    Args:
        model: with its weights.
        bf16: whether the run computes in bfloat16.

    Raises:
        UsageError: with the reason why they cannot.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        problem = find_packing_problem(model)
    if problem is not None:
        raise UsageError(f"--pack cannot join records for this model: {problem.rstrip('.')}. Leave --pack out.")


class PackedSampler(Sampler[list[int]]):
    """Draw packs of records, again and again in another order, until there are enough.

    Args:
        sizes: int[N], positions that each record takes in the language model.
        num_drawn: number of packs.
        length: positions of a pack.
        seed: equal seeds give equal packs.
        shares: how often each source is drawn; None draws every record once in a pass.
    """

    def __init__(
        self, sizes: np.ndarray, num_drawn: int, *, length: int, seed: int, shares: Shares | None = None
    ) -> None:
        self.sizes, self.num_drawn, self.length, self.seed, self.shares = sizes, num_drawn, length, seed, shares

    def __len__(self) -> int:
        return self.num_drawn

    def __iter__(self) -> Iterator[list[int]]:
        records = StreamSampler(len(self.sizes), _ENDLESS, seed=self.seed, batch_size=WINDOW, shares=self.shares)
        return islice(pack(records, self.length, lambda record: int(self.sizes[record])), self.num_drawn)


def count_packs(sizes: np.ndarray, *, length: int, seed: int, shares: Shares | None = None) -> int:
    """Count the first packs of a run until they hold as many records as there are; arguments as for `PackedSampler`."""
    left = len(sizes)
    for number, records in enumerate(PackedSampler(sizes, _ENDLESS, length=length, seed=seed, shares=shares), 1):
        left -= len(records)
        if left <= 0:
            return number
    return 0


class PackedRecords(Dataset[dict[str, Any]]):
    """Records by packs: an index is a list of records, and an item holds them one after the other.

    Args:
        records: the records.
    """

    def __init__(self, records: RecordDataset) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, indices: list[int]) -> dict[str, Any]:
        return join_items([self.records[i] for i in indices])


def join_items(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the items of several records to one.

    Returns:
        An item as `RecordDataset` has it, with a list as `index`, and `segments`, int[T], the number of each token's
        record, from 1. If an image of a record is damaged, the item is its `error`.
    """
    for item in items:
        if "error" in item:
            return item
    labels = [item["labels"].clone() for item in items]
    for row in labels:
        row[0] = IGNORED  # the token before it belongs to another record
    return {
        "index": [item["index"] for item in items],
        "ids": torch.cat([item["ids"] for item in items]),
        "labels": torch.cat(labels),
        "segments": torch.cat([torch.full_like(item["ids"], number) for number, item in enumerate(items, 1)]),
        **{name: [x for item in items for x in item[name]] for name in ("pixels", "features") if name in items[0]},
        "notes": [note for item in items for note in item.get("notes", ())],
    }
