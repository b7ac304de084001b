"""Counting right answers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from vlm_cli.evaluation.comparison import mcnemar
from vlm_cli.evaluation.intervals import add_up, draw_sums, percentile_interval, wilson_interval
from vlm_cli.evaluation.metrics import METRICS, Sample
from vlm_cli.evaluation.metrics.exact import is_exact
from vlm_cli.evaluation.scores import Marks


@pytest.mark.parametrize(
    ("exact", "items", "low", "high"),
    [
        # R. G. Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),  # 0 of 29 there, seen from the other side
    ],
)
def test_wilson_interval(exact: int, items: int, low: float, high: float) -> None:
    assert wilson_interval(exact, items) == pytest.approx((low, high), abs=6e-5)


def test_wilson_interval_is_where_the_share_would_be_surprising() -> None:
    low, high = wilson_interval(70, 100)
    for bound in (low, high):
        assert abs(0.7 - bound) / (bound * (1 - bound) / 100) ** 0.5 == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "expected", "exact"),
    [
        (" red.", "red.", True),
        ("red.\n", " red.", True),
        ("", " ", True),
        ("Red.", "red.", False),
        ("a  b", "a b", False),
        ("red", "red.", False),
        ("red. red.", "red.", False),
    ],
)
def test_is_exact(answer: str, expected: str, exact: bool) -> None:
    assert is_exact(answer, expected) is exact


def test_score_by_kind() -> None:
    answers = [("b", True), (None, False), ("a", False), ("b", False), ("b", True)]
    samples = [Sample("x" if right else "y", "x", ("x",)) for _, right in answers]
    marks = Marks(samples, [kind for kind, _ in answers], [METRICS["exact"]])
    found = [(kind, score.items, score.main.right) for kind, score in marks.by_kind().items()]
    assert found == [("a", 1, 0), ("b", 3, 2), (None, 1, 0)]
    total = marks.total()
    assert (total.items, total.main.right, total.main.value) == (5, 2, 0.4)
    assert total.main.interval == wilson_interval(2, 5)


def test_a_bootstrap_of_shares_is_near_the_normal_interval() -> None:
    statistics = np.array([[1.0, i % 4 == 0] for i in range(400)])
    drawn = METRICS["exact"].values(draw_sums(statistics)[0])[:, 0]
    low, high = percentile_interval(drawn)
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.006)
    assert (draw_sums(statistics)[0] == draw_sums(statistics)[0]).all()
    assert (draw_sums(statistics)[0] != draw_sums(statistics, seed=1)[0]).any()


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 12), (40, 40), (100, 160)])
def test_mcnemar_is_the_binomial_distribution(first: int, second: int) -> None:
    total = first + second
    tail = sum(Fraction(math.comb(total, k), 2**total) for k in range(min(first, second) + 1))
    assert mcnemar(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)), abs=1e-12)


def test_marks_that_are_all_alike_are_in_doubt() -> None:
    samples = [Sample("x", "abcd", ("abcd",))] * 4
    total = Marks(samples, [None] * 4, [METRICS["anls"]]).total()
    assert (total.main.value, total.main.interval) == (0.0, wilson_interval(0, 4))


def test_questions_about_one_picture_are_drawn_together() -> None:
    """With two questions about each picture, both right or both wrong, the doubt is that of half as many questions."""
    answers = [Sample("yes" if i % 4 < 2 else "no", "yes", ("yes",), group=f"{i // 2}") for i in range(80)]
    apart = [Sample(x.answer, "yes", ("yes",), place=f"{i}") for i, x in enumerate(answers)]
    together, alone = (Marks(x, [None] * 80, [METRICS["yes-no"]]).total().main for x in (answers, apart))
    assert (together.value, together.right) == (alone.value, alone.right) == (0.5, 40)
    assert alone.interval == wilson_interval(40, 80)
    width, wider = (high - low for low, high in (alone.interval, together.interval))
    assert wider == pytest.approx(2**0.5 * width, rel=0.08)
    statistics = np.random.default_rng(0).random((6, 2))
    slow = [statistics[[0, 3]].sum(0), statistics[1], statistics[[2, 4]].sum(0), statistics[5]]
    np.testing.assert_allclose(add_up(statistics, ["a", "", "b", "a", "b", ""]), slow)


def test_shares_of_fewer_cases_than_items_are_in_more_doubt() -> None:
    """Precision is a share of the answers yes, and accuracy+ one of pictures."""
    asked = [Sample("yes" if i < 10 else "no", "yes" if i < 10 else "no", ("x",), group=f"{i // 2}") for i in range(40)]
    found = {x.figure.name: x.interval for x in Marks(asked, [None] * 40, [METRICS["yes-no"]]).total().estimates}
    assert found["yes-no precision"] == found["yes-no recall"] == wilson_interval(10, 10)
    found = {x.figure.name: x.interval for x in Marks(asked, [None] * 40, [METRICS["mme"]]).total().estimates}
    assert (found["mme accuracy"], found["mme accuracy+"]) == (wilson_interval(20, 20), wilson_interval(20, 20))
    silent = [Sample("no", "no", ("no",))] * 5
    found = {x.figure.name: x.interval for x in Marks(silent, [None] * 5, [METRICS["yes-no"]]).total().estimates}
    assert found["yes-no precision"] == (0.0, 1.0)
