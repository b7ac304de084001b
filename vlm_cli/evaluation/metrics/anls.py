"""ANLS: how near the letters of an answer are to those of an accepted one."""

from __future__ import annotations

from vlm_cli.evaluation.metrics.metric import Figure, PerItemMetric, Sample

__all__ = ["ANLS", "edit_distance", "similarity"]

THRESHOLD = 0.5  # a share of wrong letters from which on an answer counts as another word


def edit_distance(a: str, b: str) -> int:
    """Return the fewest insertions, deletions and replacements of characters that turn one text into the other.

    Source: V. I. Levenshtein, Binary codes capable of correcting deletions, insertions and reversals, 1966.

    >>> edit_distance("kitten", "sitting")
    3
    """
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def similarity(answer: str, expected: str) -> float:
    """Return 1 less the share of wrong letters, or 0 from half of them on; case and outer whitespace do not count.

    >>> similarity("Hello World", "hello world"), round(similarity("helo world", "hello world"), 3)
    (1.0, 0.909)
    """
    a, b = (" ".join(x.casefold().split()) for x in (answer, expected))
    longest = max(len(a), len(b))
    if abs(len(a) - len(b)) >= THRESHOLD * longest and longest:  # each letter that one has more is wrong
        return 0.0
    wrong = edit_distance(a, b) / longest if longest else 0.0
    return 1 - wrong if wrong < THRESHOLD else 0.0


class ANLS(PerItemMetric):
    """The average normalised Levenshtein similarity to the nearest accepted answer."""

    name = "anls"
    summary = (
        "An answer scores 1 - d / max(lengths), with d its edit distance to the nearest accepted one, and 0 if that "
        "is at most 0.5. Case does not count."
    )
    source = "ST-VQA, https://arxiv.org/abs/1907.00490, and DocVQA, https://arxiv.org/abs/2007.00398"
    figures = (Figure("anls"),)

    def score(self, sample: Sample) -> float:
        return max(similarity(sample.answer, x) for x in sample.accepted)
