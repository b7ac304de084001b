"""Whole numbers in few bins with round borders."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

__all__ = ["Bin", "Distribution"]

_STEPS = (1, 2, 5)  # times a power of ten


@dataclass(frozen=True)
class Bin:
    """How many values lie from `low` to `high`, both included; None for `high` has no end."""

    low: int
    high: int | None
    count: int

    @property
    def label(self) -> str:
        """The borders: `20-39`, `7`, or `200+`."""
        if self.high is None:
            return f"{self.low:,}+"
        return f"{self.low:,}" if self.high == self.low else f"{self.low:,}-{self.high:,}"


class Distribution:
    """The distribution of whole numbers from 0.

    Args:
        values: at least one.
    """

    def __init__(self, values: Sequence[int]) -> None:
        self._values = sorted(values)

    def quantile(self, share: float) -> int:
        """Return the smallest value that is at least as large as this share of the values."""
        return self._values[max(0, math.ceil(share * len(self._values)) - 1)]

    @property
    def mean(self) -> float:
        return fmean(self._values)

    def bins(self, most: int = 12) -> list[Bin]:
        """Return bins of equal width. What lies far above the others is in the last one, which has no end."""
        low, top, last = self._values[0], self.quantile(0.99), self._values[-1]
        if last - low < most:
            top = last
        step = _round_up(math.ceil((top - low + 1) / max(1, most - 2)) if top - low >= most else 1)
        start = low // step * step
        edges = list(range(start, top + 1, step))
        counts = dict.fromkeys(edges, 0)
        above = 0
        for value in self._values:
            edge = value // step * step
            if edge in counts:
                counts[edge] += 1
            else:
                above += 1
        found = [Bin(edge, edge + step - 1, count) for edge, count in counts.items()]
        return [*found, Bin(edges[-1] + step, None, above)] if above else found

    def to_dict(self) -> dict[str, Any]:
        """Return what the distribution looks like."""
        return {
            "least": self.quantile(0),
            "median": self.quantile(0.5),
            "mean": round(self.mean, 2),
            "p95": self.quantile(0.95),
            "most": self.quantile(1),
            "bins": [{"from": x.low, "to": x.high, "count": x.count} for x in self.bins()],
        }


def _round_up(value: int) -> int:
    """Return the next number of the row 1, 2, 5, 10, 20, 50, …

    >>> _round_up(3), _round_up(51)
    (5, 100)
    """
    power = 1
    while True:
        for step in _STEPS:
            if step * power >= value:
                return step * power
        power *= 10
