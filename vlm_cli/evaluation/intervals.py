"""How certain a number is: intervals by Wilson's formula and by the bootstrap.

n items, k statistics of an item, f figures, R samples with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CONFIDENCE", "add_up", "draw_sums", "percentile_interval", "wilson_interval"]

CONFIDENCE = 0.95
RESAMPLES = 1000
_MOST_DRAWN = 1 << 22  # items drawn at once


def wilson_interval(right: float, items: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval in which the share of right answers to all such questions lies, with this confidence.

    Unlike the normal approximation, it has a width at shares of 0 and 1, and is right for few items.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927
    (https://doi.org/10.1080/01621459.1927.10502953).

    >>> [round(x, 3) for x in wilson_interval(10, 10)]
    [0.722, 1.0]
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = right / items, z * z / items
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / items + spread / (4 * items))
    return max(0.0, centre - half), min(1.0, centre + half)


def draw_sums(*statistics: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[np.ndarray]:
    """Draw the items with replacement, many times, and add up the statistics of those that are drawn.

    Source: B. Efron, Bootstrap methods: another look at the jackknife, 1979 (https://doi.org/10.1214/aos/1176344552).

    Args:
        statistics: float[n, k] each; several draw the same items, as a paired comparison needs it.
        resamples: R.
        seed: of the draws.

    Returns:
        float[R, k] for each.
    """
    import numpy as np

    num_items, random = len(statistics[0]), np.random.default_rng(seed)
    step = max(1, _MOST_DRAWN // num_items)
    parts: list[list[np.ndarray]] = [[] for _ in statistics]
    for start in range(0, resamples, step):
        counts = random.multinomial(num_items, [1 / num_items] * num_items, size=min(step, resamples - start))
        for found, values in zip(parts, statistics, strict=True):
            found.append(counts @ values)
    return [np.concatenate(x) for x in parts]


def add_up(statistics: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Add up the statistics of the items of each cluster, so that a bootstrap draws whole clusters.

    Items about one picture, or the turns of one conversation, are not independent: drawn one by one, they would make an
    interval too narrow.

    Source: A. C. Davison and D. V. Hinkley, Bootstrap methods and their application, 1997, section 3.8.

    Args:
        statistics: float[n, k].
        clusters: of the items; an empty name is a cluster of its own.

    Returns:
        float[c, k] for c clusters; the statistics themselves if each item is one.
    """
    import numpy as np

    place: dict[str, int] = {}
    codes = [place.setdefault(name or f"\0{i}", len(place)) for i, name in enumerate(clusters)]
    if len(place) == len(codes):
        return statistics
    found = np.zeros((len(place), statistics.shape[1]))
    np.add.at(found, codes, statistics)
    return found


def percentile_interval(drawn: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return between which values this share of float[R] drawn values lies."""
    import numpy as np

    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
