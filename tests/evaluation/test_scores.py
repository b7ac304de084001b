"""Counting right answers."""

from __future__ import annotations

import pytest

from vlm_cli.evaluation.scores import Score, is_exact, score, wilson_interval


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
    kinds, total = score(answers)
    assert list(kinds.items()) == [("a", Score(1, 0)), ("b", Score(3, 2)), (None, Score(1, 0))]
    assert total == Score(5, 2) and total.share == 0.4
