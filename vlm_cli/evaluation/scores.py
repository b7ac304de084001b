"""The figures of some answers, by kind, each with an interval that says how certain it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_cli.evaluation.intervals import add_up, draw_sums, percentile_interval, wilson_interval
from vlm_cli.evaluation.metrics import Figure, Metric, Sample

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Estimate", "Marks", "Score", "estimate_figures", "interval_of"]


@dataclass(frozen=True)
class Estimate:
    """A figure of some items.

    Attributes:
        figure: what it is.
        value: of the figure.
        interval: the 95 % confidence interval: Wilson's for shares of right answers to independent questions and for
            shares that are the same in every sample of a bootstrap, and else the bootstrap's.
        right: the number of right answers, where an answer is right or wrong.
    """

    figure: Figure
    value: float
    interval: tuple[float, float]
    right: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, those of shares from 0 to 1."""
        right = {} if self.right is None else {"right": self.right}
        return {**right, "value": self.value, "interval": list(self.interval)}


@dataclass(frozen=True)
class Score:
    """The figures of some items, those of the first metric first."""

    items: int
    estimates: tuple[Estimate, ...]

    @property
    def main(self) -> Estimate:
        """The main figure of the first metric."""
        return self.estimates[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the number of items, and the figures by name."""
        return {"items": self.items, "scores": {x.figure.name: x.to_dict() for x in self.estimates}}


class Marks:
    """The statistics of answers by several metrics.

    Args:
        samples: the answers; at least one.
        kinds: of each item; None for none.
        metrics: at least one.

    Attributes:
        statistics: float[n, k] for each metric.
        clusters: of each item, for intervals.
    """

    def __init__(self, samples: Sequence[Sample], kinds: Sequence[str | None], metrics: Sequence[Metric]) -> None:
        self.kinds, self.metrics = list(kinds), list(metrics)
        self.statistics = [metric.measure(samples) for metric in metrics]
        self.clusters = [sample.cluster for sample in samples]

    def of_items(self) -> list[dict[str, float]]:
        """Return for each item the main figure of each metric, by the metric's name, as if it were the only item."""
        columns = [metric.values(x)[:, 0] for metric, x in zip(self.metrics, self.statistics, strict=True)]
        names = [metric.name for metric in self.metrics]
        return [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns, strict=True)]

    def total(self) -> Score:
        """Return the score of all items."""
        return self._score(range(len(self.kinds)))

    def by_kind(self) -> dict[str | None, Score]:
        """Return the score of each kind, in the order of their names; items without a kind come last."""
        found: dict[str | None, list[int]] = {}
        for i, kind in enumerate(self.kinds):
            found.setdefault(kind, []).append(i)
        return {kind: self._score(found[kind]) for kind in sorted(found, key=lambda x: (x is None, x))}

    def _score(self, chosen: Sequence[int]) -> Score:
        estimates: list[Estimate] = []
        for metric, statistics in zip(self.metrics, self.statistics, strict=True):
            estimates += estimate_figures(metric, statistics[list(chosen)], [self.clusters[i] for i in chosen])
        return Score(len(chosen), tuple(estimates))


def estimate_figures(metric: Metric, statistics: np.ndarray, clusters: Sequence[str] = ()) -> list[Estimate]:
    """Return the figures of a metric.

    Args:
        metric: the metric.
        statistics: float[n, k].
        clusters: of the items, which a bootstrap draws as a whole; without any, each item is one.
    """
    sums, units = statistics.sum(axis=0), add_up(statistics, clusters) if clusters else statistics
    values, counts = metric.values(sums), metric.counts(sums)
    drawn = None
    estimates = []
    for i, figure in enumerate(metric.figures):
        is_binary = i == 0 and metric.is_binary
        right = round(float(values[0]) * len(statistics)) if is_binary else None
        if right is not None and len(units) == len(statistics):
            items = len(statistics)
            estimates.append(Estimate(figure, right / items, wilson_interval(right, items), right))
            continue
        if drawn is None:
            drawn = metric.values(draw_sums(units)[0])
        cases = min(float(counts[i]), len(units))
        estimates.append(Estimate(figure, float(values[i]), interval_of(drawn[:, i], figure, cases), right))
    return estimates


def interval_of(drawn: np.ndarray, figure: Figure, cases: float) -> tuple[float, float]:
    """Return the interval of float[R] drawn values.

    Where it has no width, as of one item or of marks that are all 0, the bootstrap knows of no doubt. Wilson's interval
    is then on the safe side: no marks between 0 and 1 vary more than right and wrong answers of the same mean.
    """
    low, high = percentile_interval(drawn)
    if figure.is_share and low == high:
        return wilson_interval(low * cases, cases) if cases else (0.0, 1.0)
    return low, high
