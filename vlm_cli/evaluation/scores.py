"""How many answers are right, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

__all__ = ["CONFIDENCE", "RULE", "Score", "is_exact", "score", "wilson_interval"]

CONFIDENCE = 0.95
RULE = "An answer is exact if it equals the completion; only whitespace before and after them does not count."


def is_exact(answer: str, expected: str) -> bool:
    r"""Whether an answer is right; see `RULE`.

    >>> is_exact(" A cat.\n", "A cat."), is_exact("a cat.", "A cat."), is_exact("A  cat.", "A cat.")
    (True, False, False)
    """
    return answer.strip() == expected.strip()


def wilson_interval(exact: int, items: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Where the share of right answers lies, were the model asked any number of such questions.

    Unlike the usual ± it has a width at 0 and at 1, and holds for few items.

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
    """Right answers among some items."""

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
    """Scores of each kind, by name, and of all.

    Args:
        answers: kind of each item, and whether its answer is exact; at least one.
    """
    found: dict[str | None, list[bool]] = {}
    for kind, exact in answers:
        found.setdefault(kind, []).append(exact)
    # Items without a kind come last.
    kinds = {kind: Score(len(found[kind]), sum(found[kind])) for kind in sorted(found, key=lambda x: (x is None, x))}
    return kinds, Score(sum(x.items for x in kinds.values()), sum(x.exact for x in kinds.values()))
