"""Count right answers, and say how certain the share is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

__all__ = ["CONFIDENCE", "RULE", "Score", "is_exact", "score", "wilson_interval"]

CONFIDENCE = 0.95
RULE = "An answer is exact if it equals the completion; only whitespace before and after them does not count."


def is_exact(answer: str, expected: str) -> bool:
    r"""Tell whether an answer is right; see `RULE`.

    >>> is_exact(" A cat.\n", "A cat."), is_exact("a cat.", "A cat."), is_exact("A  cat.", "A cat.")
    (True, False, False)
    """
    return answer.strip() == expected.strip()


def wilson_interval(exact: int, items: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval in which the share of right answers to all such questions lies, with this confidence.

    Unlike the normal approximation, it has a width at shares of 0 and 1, and is right for few items.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927
    (https://doi.org/10.1080/01621459.1927.10502953).

    >>> [round(x, 3) for x in wilson_interval(10, 10)]
    [0.722, 1.0]
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = exact / items, z * z / items
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / items + spread / (4 * items))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Score:
    """How many of some items were answered right."""

    items: int
    exact: int

    @property
    def share(self) -> float:
        return self.exact / self.items

    @property
    def interval(self) -> tuple[float, float]:
        """The share's 95 % confidence interval."""
        return wilson_interval(self.exact, self.items)


def score(answers: Iterable[tuple[str | None, bool]]) -> tuple[dict[str | None, Score], Score]:
    """Return the score of each kind, by name, and the score of all.

    Args:
        answers: the kind of each item, and whether its answer is exact; at least one item.
    """
    found: dict[str | None, list[bool]] = {}
    for kind, exact in answers:
        found.setdefault(kind, []).append(exact)
    # Items without a kind come last.
    kinds = {kind: Score(len(found[kind]), sum(found[kind])) for kind in sorted(found, key=lambda x: (x is None, x))}
    return kinds, Score(sum(x.items for x in kinds.values()), sum(x.exact for x in kinds.values()))
