"""Count the rows that a run leaves out, so that none is left out in silence."""

from __future__ import annotations

from typing import Any

__all__ = ["SkippedRows"]

_MOST_KEPT = 20  # rows that are named


class SkippedRows:
    """Rows that cannot be used, with the reasons.

    >>> skipped = SkippedRows()
    >>> skipped.add("line 7 of a.jsonl", "not JSON.")
    >>> skipped.add("line 7 of a.jsonl", "not JSON.")
    >>> print(skipped.describe())
    Skipped 2 rows that cannot be used, each time that they came:
      line 7 of a.jsonl: not JSON.
    """

    def __init__(self) -> None:
        self.count = 0
        self._reasons: dict[str, str] = {}

    def add(self, place: str, reason: str) -> None:
        """Count a row; one that comes again counts again."""
        self.count += 1
        if len(self._reasons) < _MOST_KEPT or place in self._reasons:
            self._reasons[place] = reason

    def describe(self) -> str:
        """Name the rows; the empty text if there are none."""
        if not self.count:
            return ""
        some = f" The first {_MOST_KEPT} of them" if len(self._reasons) == _MOST_KEPT else ""
        rows = f"{self.count:,} row{'' if self.count == 1 else 's'}"
        head = f"Skipped {rows} that cannot be used, each time that they came"
        return "\n".join(
            [f"{head}.{some}:" if some else f"{head}:", *(f"  {x}: {y}" for x, y in self._reasons.items())]
        )

    def state(self) -> dict[str, Any]:
        """Return, as JSON has it, what `continued` takes."""
        return {"count": self.count, "reasons": dict(self._reasons)}

    @classmethod
    def continued(cls, state: dict[str, Any]) -> SkippedRows:
        """Continue to count."""
        skipped = cls()
        skipped.count, skipped._reasons = state["count"], dict(state["reasons"])
        return skipped

    def join(self, other: SkippedRows) -> None:
        """Add the rows of another process."""
        self.count += other.count
        self._reasons = dict(list((self._reasons | other._reasons).items())[:_MOST_KEPT])
