"""How figures are written for people: shares as percentages, other figures times a hundred, as papers give them."""

from __future__ import annotations

from vlm_cli.evaluation.comparison import Difference
from vlm_cli.evaluation.scores import Estimate

__all__ = ["difference_cells", "estimate_cells", "name_kind", "show_p"]


def estimate_cells(estimate: Estimate) -> list[str]:
    """Return a figure's name, value and interval."""
    is_share = estimate.figure.is_share
    return [estimate.figure.name, _number(estimate.value, is_share), _range(estimate.interval, is_share)]


def difference_cells(difference: Difference) -> list[str]:
    """Return a figure's name, the values of both models, the difference, its interval and the p-value."""
    is_share = difference.figure.is_share
    unit = " points" if is_share else ""
    low, high = difference.interval
    return [
        difference.figure.name,
        *(_number(x, is_share) for x in difference.values),
        f"{100 * difference.value:+.1f}{unit}",
        f"{100 * low:+.1f} – {100 * high:+.1f}",
        show_p(difference.p_value),
    ]


def show_p(value: float) -> str:
    """Write a p-value.

    >>> show_p(0.0312), show_p(0.00001)
    ('0.031', '< 0.001')
    """
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def name_kind(kind: str | None) -> str:
    """Write the kind of items."""
    return "(no kind)" if kind is None else kind


def _number(value: float, is_share: bool) -> str:
    return f"{100 * value:.1f}{' %' if is_share else ''}"


def _range(interval: tuple[float, float], is_share: bool) -> str:
    low, high = interval
    return f"{100 * low:.1f} – {100 * high:.1f}{' %' if is_share else ''}"
