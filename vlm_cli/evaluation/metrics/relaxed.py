"""Relaxed accuracy: numbers may be off by 5 %."""

from __future__ import annotations

import math

from vlm_cli.evaluation.metrics.metric import Figure, PerItemMetric, Sample

__all__ = ["Relaxed", "is_near", "read_number"]

TOLERANCE = 0.05  # of the right number


def read_number(text: str) -> float | None:
    """Return the number that a text is, with a percentage as hundredths; None if it is none.

    >>> read_number(" 12.5 "), read_number("8%"), read_number("1,200"), read_number("two"), read_number("nan")
    (12.5, 0.08, None, None, None)
    """
    text = text.strip()
    try:
        number = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def is_near(answer: str, expected: str) -> bool:
    """Tell whether an answer is the right number within 5 %, or the right text in any case.

    >>> is_near("105", "100"), is_near("105.1", "100"), is_near("Blue ", "blue"), is_near("0.01", "0")
    (True, False, True, False)
    """
    given, right = read_number(answer), read_number(expected)
    if given is None or right is None:
        return answer.strip().casefold() == expected.strip().casefold()
    return abs(given - right) <= TOLERANCE * abs(right)


class Relaxed(PerItemMetric):
    """1 if the answer is a right number within 5 %, or a right text."""

    name = "relaxed"
    summary = "A number is right within 5 % of an accepted one (8% is 0.08), and a text if it equals one in any case."
    source = "PlotQA, https://arxiv.org/abs/1909.00997, and ChartQA, https://arxiv.org/abs/2203.10244"
    figures = (Figure("relaxed"),)
    is_binary = True

    def score(self, sample: Sample) -> float:
        return float(any(is_near(sample.answer, x) for x in sample.accepted))
