"""The scores of a composition over its seeds, and how they differ from those of another one.

With one seed, they are those of `vlm eval`. With several, the answers of all seeds count together, and a bootstrap
draws questions and seeds: each sample takes so many questions with replacement, the same for all seeds and models, and
so many seeds with replacement. So the interval also says how much another seed would change, as far as these few tell.

n items, k statistics of an item, f figures of a metric, R samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm_cli.errors import DataError
from vlm_cli.evaluation.answers import make_sample
from vlm_cli.evaluation.comparison import RESAMPLES, Difference, bootstrap_p, compare_statistics
from vlm_cli.evaluation.intervals import add_up, draw_sums, percentile_interval
from vlm_cli.evaluation.metrics import Metric, Sample
from vlm_cli.evaluation.scores import Estimate, Score, estimate_figures, interval_of
from vlm_cli.plain_data import parse_json
from vlm_cli.prompt import format

if TYPE_CHECKING:
    from vlm_cli.evaluation.items import Item

__all__ = ["Answered", "difference_of", "read_answers", "score_of"]


@dataclass(frozen=True)
class Answered:
    """What one run answered.

    Attributes:
        given: bool[n], which items have an answer.
        statistics: float[n, k] of each metric; zeros where there is no answer.
        clusters: of the items, which a bootstrap draws as a whole; without any, each item is one.
    """

    given: np.ndarray
    statistics: Sequence[np.ndarray]
    clusters: Sequence[str] = ()

    def clusters_of(self, chosen: np.ndarray) -> list[str]:
        """Return the clusters of the items that bool[n] chooses."""
        return [name for name, is_chosen in zip(self.clusters, chosen, strict=False) if is_chosen]


def read_answers(path: Path, items: Sequence[Item], metrics: Sequence[Metric]) -> Answered:
    """Read the file of answers that `vlm eval` wrote, and mark them.

    Raises:
        DataError: if it does not hold these items.
    """
    rows: dict[tuple[str, str, str], list[dict[str, object]]] = defaultdict(list)
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = parse_json(line)
            rows[row["id"], row["prompt"], row["expected"]].append(row)
        found = [rows[x.id, format(x.asked), x.expected].pop(0) for x in items]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise DataError(
            f"{str(path)!r} does not hold the answers to these questions. Delete it, and give the same command again."
        ) from None
    given = np.array(["answer" in row for row in found])
    samples = [make_sample(x, str(row.get("answer", ""))) for x, row in zip(items, found, strict=True)]
    statistics = [_measure(metric, samples, found, given) for metric in metrics]
    return Answered(given, statistics, [sample.cluster for sample in samples])


def _measure(
    metric: Metric, samples: Sequence[Sample], rows: Sequence[Mapping[str, object]], given: np.ndarray
) -> np.ndarray:
    """Return float[n, k] statistics. Where a metric rates choices, its mark in the file counts: 1 and the mark."""
    if metric.needs_likelihoods:
        marks = [row.get("scores") or {} for row in rows]
        found = np.array([[1.0, float(x.get(metric.name, 0.0))] for x in marks])  # type: ignore[attr-defined]
        return found * given[:, None]
    chosen = [sample for sample, is_given in zip(samples, given, strict=True) if is_given]
    measured = metric.measure(chosen)
    found = np.zeros((len(samples), measured.shape[1]))
    found[given] = measured
    return found


def score_of(seeds: Sequence[Answered], metrics: Sequence[Metric]) -> Score:
    """Return the figures of one or several runs of one composition."""
    estimates: list[Estimate] = []
    for i, metric in enumerate(metrics):
        statistics = [run.statistics[i] for run in seeds]
        if len(seeds) == 1:
            given = seeds[0].given
            estimates += estimate_figures(metric, statistics[0][given], seeds[0].clusters_of(given))
        else:
            estimates += _estimate_over_seeds(metric, statistics, seeds[0].clusters)
    return Score(int(max(run.given.sum() for run in seeds)), tuple(estimates))


def _estimate_over_seeds(metric: Metric, statistics: Sequence[np.ndarray], clusters: Sequence[str]) -> list[Estimate]:
    sums = np.sum(statistics, axis=(0, 1))
    values, counts = metric.values(sums), metric.counts(sums)
    units = _join(statistics, clusters)
    drawn = metric.values(_draw(units)[0])
    cases = [min(float(x) / len(statistics), len(units[0])) for x in counts]
    return [
        Estimate(figure, float(values[i]), interval_of(drawn[:, i], figure, cases[i]))
        for i, figure in enumerate(metric.figures)
    ]


def _join(statistics: Sequence[np.ndarray], clusters: Sequence[str]) -> list[np.ndarray]:
    """Add up what belongs together in the answers of each seed."""
    return [add_up(x, clusters) if clusters else x for x in statistics]


def difference_of(
    first: Mapping[int, Answered], second: Mapping[int, Answered], metrics: Sequence[Metric]
) -> list[Difference]:
    """Compare two compositions on the seeds and the items that both have.

    Args:
        first: seed -> its answers.
        second: the same of the other composition, whose figures less those of the first are the differences.
        metrics: by which both are marked.

    Returns:
        A difference for each figure; none if the two have no seed or no item in common.
    """
    pairs = [(first[seed], second[seed]) for seed in first if seed in second]
    both = [one.given & other.given for one, other in pairs]
    if not any(x.any() for x in both):
        return []
    found: list[Difference] = []
    for i, metric in enumerate(metrics):
        if len(pairs) == 1:
            one, other = (run.statistics[i][both[0]] for run in pairs[0])
            found += compare_statistics(metric, one, other, pairs[0][0].clusters_of(both[0]))
        else:
            sides = [
                [pair[side].statistics[i] * mask[:, None] for pair, mask in zip(pairs, both, strict=True)]
                for side in (0, 1)
            ]
            items, clusters = int(max(x.sum() for x in both)), pairs[0][0].clusters
            found += _compare_over_seeds(metric, _join(sides[0], clusters), _join(sides[1], clusters), items)
    return found


def _compare_over_seeds(
    metric: Metric, first: Sequence[np.ndarray], second: Sequence[np.ndarray], items: int
) -> list[Difference]:
    values = [metric.values(np.sum(x, axis=(0, 1))) for x in (first, second)]
    drawn = [metric.values(x) for x in _draw(first, second, resamples=RESAMPLES)]
    differences = []
    for i, figure in enumerate(metric.figures):
        apart = drawn[1][:, i] - drawn[0][:, i]
        before, after = float(values[0][i]), float(values[1][i])
        interval, p_value = percentile_interval(apart), bootstrap_p(apart)
        found = Difference(figure, items, (before, after), after - before, interval, p_value, "bootstrap over seeds")
        differences.append(found)
    return differences


def _draw(*models: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> list[np.ndarray]:
    """Draw items and seeds with replacement, the same for all models: float[R, k] sums of each model."""
    num_seeds = len(models[0])
    sums = draw_sums(*(x for model in models for x in model), resamples=resamples, seed=seed)
    random = np.random.default_rng(seed + 1)
    times = random.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=resamples)  # [R, seeds]
    of_models = [sums[i : i + num_seeds] for i in range(0, len(sums), num_seeds)]
    return [np.einsum("rs,srk->rk", times, np.stack(x)) for x in of_models]
