"""Scores over seeds: equal to those of `vlm eval` for one, and to a slow loop for several."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_cli.evaluation.comparison import RESAMPLES, compare_statistics
from vlm_cli.evaluation.metrics import METRICS
from vlm_cli.evaluation.scores import estimate_figures
from vlm_cli.sweeps.scoring import Answered, _draw, difference_of, score_of

EXACT = METRICS["exact"]
NUM_ITEMS = 40


def answered(share: float, seed: int, missing: int = 0) -> Answered:
    random = np.random.default_rng(seed)
    given = np.arange(NUM_ITEMS) >= missing
    marks = (random.random(NUM_ITEMS) < share).astype(float)
    return Answered(given, [np.stack([np.ones(NUM_ITEMS), marks], axis=1) * given[:, None]])


def test_one_seed_is_as_vlm_eval():
    first, second = answered(0.4, 1, missing=3), answered(0.7, 2)
    assert score_of([first], [EXACT]).estimates == tuple(estimate_figures(EXACT, first.statistics[0][3:]))
    assert score_of([first], [EXACT]).items == NUM_ITEMS - 3
    differences = difference_of({0: first}, {0: second, 1: second}, [EXACT])
    assert differences == compare_statistics(EXACT, first.statistics[0][3:], second.statistics[0][3:])


def test_several_seeds_count_together():
    runs = [answered(0.5, seed) for seed in range(3)]
    score = score_of(runs, [EXACT]).main
    marks = np.stack([run.statistics[0][:, 1] for run in runs])
    assert score.value == pytest.approx(marks.mean())
    # a slow loop over the same draws, one sample after the other
    items = np.random.default_rng(0).multinomial(NUM_ITEMS, [1 / NUM_ITEMS] * NUM_ITEMS, size=RESAMPLES)
    seeds = np.random.default_rng(1).multinomial(3, [1 / 3] * 3, size=RESAMPLES)
    drawn = []
    for of_items, of_seeds in zip(items, seeds, strict=True):
        right = 0.0
        for times, row in zip(of_seeds, marks, strict=True):
            right += times * sum(n * mark for n, mark in zip(of_items, row, strict=True))
        drawn.append(right / (NUM_ITEMS * 3))
    assert score.interval == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_seeds_that_differ_make_the_interval_wider():
    """The twin: with seeds that answer alike, the interval is that of the items alone."""
    alike = [answered(0.5, 1)] * 3
    apart = [answered(share, 1) for share in (0.05, 0.5, 0.95)]
    widths = [np.subtract(*score_of(runs, [EXACT]).main.interval[::-1]) for runs in (alike, apart)]
    assert widths[1] > 1.3 * widths[0]
    own = np.subtract(*estimate_figures(EXACT, alike[0].statistics[0])[0].interval[::-1])
    assert widths[0] == pytest.approx(own, abs=0.06)


def test_a_difference_over_seeds_is_paired():
    first = {seed: answered(0.5, seed) for seed in range(3)}
    [same] = difference_of(first, dict(first), [EXACT])
    assert (same.value, same.interval, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    better = {seed: Answered(x.given, [np.maximum(x.statistics[0], [1.0, 0.0])]) for seed, x in first.items()}
    for seed, x in better.items():
        x.statistics[0][:20, 1] = 1.0
        assert x.statistics[0][:, 1].sum() > first[seed].statistics[0][:, 1].sum()
    [apart] = difference_of(first, better, [EXACT])
    assert apart.interval[0] > 0
    assert apart.p_value < 0.01
    assert apart.value == pytest.approx(apart.values[1] - apart.values[0])
    assert difference_of({0: first[0]}, {1: first[1]}, [EXACT]) == []


def test_models_share_their_draws():
    stats = [answered(0.5, seed).statistics[0] for seed in range(2)]
    one, two = _draw(stats, stats)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, _draw(stats, seed=7)[0])


def test_items_that_belong_together_are_drawn_together():
    """Twenty pictures with two questions each, answered alike: the intervals are those of twenty questions."""
    marks = (np.random.default_rng(3).random(20) < 0.5).astype(float)
    once = [Answered(np.ones(20, bool), [np.stack([np.ones(20), marks], axis=1)])] * 2
    twice = np.repeat(once[0].statistics[0], 2, axis=0)
    clusters = [str(i // 2) for i in range(40)]
    together = [Answered(np.ones(40, bool), [twice], clusters)] * 2
    apart = [Answered(np.ones(40, bool), [twice])] * 2
    of_once, of_together, of_apart = (score_of(x, [EXACT]).main.interval for x in (once, together, apart))
    assert of_together == pytest.approx(of_once)
    assert np.subtract(*of_apart[::-1]) < 0.9 * np.subtract(*of_once[::-1])
    other = [Answered(np.ones(40, bool), [twice * [1, 0.5]], clusters)] * 2
    [difference] = difference_of(dict(enumerate(together)), dict(enumerate(other)), [EXACT])
    assert difference.value == pytest.approx(-0.5 * marks.mean())
