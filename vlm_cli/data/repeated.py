"""Ids that several records have: often a file that was joined twice."""

from __future__ import annotations

from vlm_cli.data.record import Record
from vlm_cli.printable import count_of

__all__ = ["RepeatedIds"]


class RepeatedIds:
    """Count the ids that were seen before."""

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}  # hash of an id -> the first place
        self._repeated = set[int]()
        self._example = ""

    def add(self, record: Record) -> None:
        """Look at a record. One that has no id is called after its row, and repeats nothing."""
        if record.id == f"{record.unit} {record.line}":
            return
        key = hash(record.id)
        first = self._seen.setdefault(key, record.place)
        if first is not record.place and first != record.place and key not in self._repeated:
            self._repeated.add(key)
            self._example = self._example or f"{record.id!r} in {first} and in {record.place}"

    @property
    def notes(self) -> list[str]:
        """One note, if any id came twice."""
        if not self._repeated:
            return []
        verb = "stands" if len(self._repeated) == 1 else "stand"
        return [f"Note: {count_of(len(self._repeated), 'id')} {verb} at more than one record, as {self._example}."]
