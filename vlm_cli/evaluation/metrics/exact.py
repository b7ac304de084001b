"""Equal texts: as they stand, and after a normalisation."""

from __future__ import annotations

import re

from vlm_cli.evaluation.metrics.metric import Figure, PerItemMetric, Sample

__all__ = ["Exact", "Normalised", "is_exact", "normalise"]

_MARKS = re.compile(r"(?<!\d)[^\w\s']|[^\w\s'](?!\d)|_")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def is_exact(answer: str, expected: str) -> bool:
    r"""Tell whether two texts are equal, apart from whitespace at both ends.

    >>> is_exact(" A cat.\n", "A cat."), is_exact("a cat.", "A cat."), is_exact("A  cat.", "A cat.")
    (True, False, False)
    """
    return answer.strip() == expected.strip()


def normalise(text: str) -> str:
    """Write in lower case, without articles, without marks that stand in no number, and with single spaces.

    >>> normalise("  The red Car. "), normalise("1,000.5 m"), normalise("A")
    ('red car', '1,000.5 m', 'a')
    """
    words = " ".join(_MARKS.sub(" ", text.casefold()).split())
    return " ".join(_ARTICLES.sub(" ", words).split()) or words


class Exact(PerItemMetric):
    """1 if the answer equals one that is accepted."""

    name = "exact"
    summary = "An answer is right if it equals an accepted one; whitespace before and after them does not count."
    source = "the usual meaning"
    figures = (Figure("exact"),)
    is_binary = True

    def score(self, sample: Sample) -> float:
        return float(any(is_exact(sample.answer, x) for x in sample.accepted))


class Normalised(PerItemMetric):
    """1 if the answer equals one that is accepted, after `normalise`."""

    name = "normalised"
    summary = (
        "An answer is right if it equals an accepted one in lower case, without articles (a, an, the) and without "
        "marks outside of numbers."
    )
    source = "after SQuAD, https://arxiv.org/abs/1606.05250"
    figures = (Figure("normalised"),)
    is_binary = True

    def score(self, sample: Sample) -> float:
        answer = normalise(sample.answer)
        return float(any(answer == normalise(x) for x in sample.accepted))
