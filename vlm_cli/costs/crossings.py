"""From how many tokens of text on one of two models costs less than the other."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["crossings"]


def crossings(
    first: Callable[[int], float], second: Callable[[int], float], most: int, *, least: int = 1, step: int = 16
) -> list[tuple[int, bool]]:
    """Find from how many tokens of text on which of two costs is the lower one.

    Args:
        first, second: the two costs, by tokens of text.
        most: tokens to look up to.
        least: tokens to begin with.
        step: factor between the lengths at which the costs are compared first. Of two changes between neighbours,
            none is found.

    Returns:
        Tokens, and whether the second side costs less from there on; first the least number.
    """

    def second_is_lower(tokens: int) -> bool:
        return second(tokens) < first(tokens)

    found = [(least, second_is_lower(least))]
    low = least
    while low < most:
        high = min(low * step, most)
        if second_is_lower(high) != found[-1][1]:
            found.append((_bisect(first, second, low, high), not found[-1][1]))
        low = high
    return found


def _bisect(first: Callable[[int], float], second: Callable[[int], float], low: int, high: int) -> int:
    """Find the first number of tokens at which the difference of two costs has the sign that it has at `high`."""

    def difference(tokens: int) -> float:
        return second(tokens) - first(tokens)

    halves = False
    while high - low > 1:
        a, b, before = difference(low), difference(high), high - low
        # Costs are nearly straight lines, so their crossing is near that of the lines; a middle would take longer.
        guess = (low + high) // 2 if halves or a == b else round(low + before * a / (a - b))
        middle = min(max(guess, low + 1), high - 1)
        if (difference(middle) < 0) == (b < 0):
            high = middle
        else:
            low = middle
        halves = not halves and high - low > before // 2
    return high
