"""Two models on the same items: the difference of each figure, and whether chance would give it as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_cli.errors import DataError
from vlm_cli.evaluation.intervals import add_up, draw_sums, percentile_interval
from vlm_cli.evaluation.metrics import Figure, Metric

if TYPE_CHECKING:
    import numpy as np

    from vlm_cli.evaluation.run import Evaluation

__all__ = ["RESAMPLES", "Difference", "bootstrap_p", "compare", "compare_statistics", "mcnemar"]

RESAMPLES = 5000


@dataclass(frozen=True)
class Difference:
    """The second model's figure less the first's, on the items that both answered.

    Attributes:
        figure: what is compared.
        items: that both models answered.
        values: of the two models.
        value: the difference.
        interval: its 95 % confidence interval, from a paired bootstrap.
        p_value: how likely a difference of this size or more is between two models that are equally good.
        test: "McNemar" (exact) for right and wrong answers to independent questions, and else "paired bootstrap".
        only: for right and wrong answers, the items that only the first, and only the second model answers right.
    """

    figure: Figure
    items: int
    values: tuple[float, float]
    value: float
    interval: tuple[float, float]
    p_value: float
    test: str
    only: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, those of shares from 0 to 1."""
        return {
            "figure": self.figure.name,
            "items": self.items,
            "values": list(self.values),
            "difference": self.value,
            "interval": list(self.interval),
            "p_value": self.p_value,
            "test": self.test,
            **({} if self.only is None else {"only_first_right": self.only[0], "only_second_right": self.only[1]}),
        }


def mcnemar(first: int, second: int) -> float:
    """Return the probability that a fair coin, thrown for each item that one model alone answers right, is as uneven.

    Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions or percentages, 1947
    (https://doi.org/10.1007/BF02295996), with the exact binomial distribution and both sides.

    >>> mcnemar(0, 0), mcnemar(0, 5), round(mcnemar(3, 12), 4)
    (1.0, 0.0625, 0.0352)

    Args:
        first: items that only the first model answers right.
        second: items that only the second model answers right.
    """
    total, least = first + second, min(first, second)
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(least + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def compare(first: Evaluation, second: Evaluation) -> list[Difference]:
    """Compare two evaluations of the same items by the same metrics.

    Raises:
        DataError: if no item is answered by both.
    """
    places = [{x.item.key: i for i, x in enumerate(found.answers)} for found in (first, second)]
    both = [key for key in places[0] if key in places[1]]
    if not both:
        raise DataError("the models cannot be compared: no item is answered by both.")
    chosen = [[place[key] for key in both] for place in places]
    differences: list[Difference] = []
    for metric, *statistics in zip(first.metrics, first.marks.statistics, second.marks.statistics, strict=True):
        clusters = [first.marks.clusters[i] for i in chosen[0]]
        differences += compare_statistics(metric, statistics[0][chosen[0]], statistics[1][chosen[1]], clusters)
    return differences


def compare_statistics(
    metric: Metric, first: np.ndarray, second: np.ndarray, clusters: Sequence[str] = ()
) -> list[Difference]:
    """Compare statistics of the same items.

    Args:
        metric: the metric.
        first, second: float[n, k] of two models.
        clusters: of the items, which the bootstrap draws as a whole; without any, each item is one.
    """
    import numpy as np

    values = [metric.values(x.sum(axis=0)) for x in (first, second)]
    units = [add_up(x, clusters) if clusters else x for x in (first, second)]
    drawn = [metric.values(x) for x in draw_sums(*units, resamples=RESAMPLES)]
    are_alone = len(units[0]) == len(first)  # as McNemar's test assumes it
    own = [metric.values(x)[:, 0] for x in (first, second)]
    differences = []
    for i, figure in enumerate(metric.figures):
        apart = drawn[1][:, i] - drawn[0][:, i]
        only = None
        if i == 0 and metric.is_binary:
            only = int(np.sum(own[0] > own[1])), int(np.sum(own[1] > own[0]))
        pairs = only if are_alone else None
        p_value = bootstrap_p(apart) if pairs is None else mcnemar(*pairs)
        before, after = float(values[0][i]), float(values[1][i])
        differences.append(
            Difference(
                figure,
                len(first),
                (before, after),
                after - before,
                percentile_interval(apart),
                p_value,
                "paired bootstrap" if pairs is None else "McNemar",
                only,
            )
        )
    return differences


def bootstrap_p(apart: np.ndarray) -> float:
    """Return twice the share of drawn differences on the rarer side of nothing; the data themselves count as one.

    Source: A. C. Davison and D. V. Hinkley, Bootstrap methods and their application, 1997, section 4.2.
    """
    import numpy as np

    sides = [int(np.sum(apart <= 0)), int(np.sum(apart >= 0))]
    return min(1.0, 2 * (min(sides) + 1) / (len(apart) + 1))
