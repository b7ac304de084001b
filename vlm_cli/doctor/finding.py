"""What a check measures, and what `vlm doctor` reports about it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Decided", "Finding", "Measured", "Verdict"]

Verdict = Literal["holds", "fails", "limit", "skipped"]


@dataclass(frozen=True)
class Measured:
    """A comparison of two ways to compute the same numbers.

    Attributes:
        difference: largest absolute difference between the two ways; infinite if either gave NaN.
        scale: largest absolute number; rounding errors grow with it.
        twin: the difference after a change that the comparison must notice.
    """

    difference: float
    scale: float
    twin: float


@dataclass(frozen=True)
class Decided:
    """The verdict of a check that counts or looks up, and needs no judge.

    Attributes:
        verdict: the check never decides "limit"; only the judge does.
        note: the reason, or what the check counted.
        difference: how many numbers or names are wrong.
        allowed: how many may be wrong.
    """

    verdict: Verdict
    note: str
    difference: float | None = None
    allowed: float | None = None


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: the check's name in `CHECKS`.
        proves: what you know about a model that passes.
        verdict: "holds"; "fails"; "limit" if the bare language model fails in the same way; "skipped" if this model has
            nothing to compare.
        difference: largest absolute difference between numbers that should be equal; infinite if the check could not
            compute it.
        allowed: the largest difference that rounding explains.
        twin: the difference after a change that the check must notice.
        note: why the verdict is not "holds", or what the check counted.
        seconds: how long the check took.
    """

    name: str
    proves: str
    verdict: Verdict
    difference: float | None = None
    allowed: float | None = None
    twin: float | None = None
    note: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; infinity and NaN become None."""
        data = asdict(self)
        return {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in data.items()}
