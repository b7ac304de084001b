"""`SlotQueue`: rows that wait for a slot, and when they get one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from vlm_cli.generation.batch_size import BatchSize
from vlm_cli.generation.choosing import RowChooser
from vlm_cli.generation.rows import Row
from vlm_cli.generation.slots import Seat, Slots

__all__ = ["SlotQueue"]

MIN_FREE = 8  # rows wait until one slot of so many is free, so that several prompts are read together


class SlotQueue:
    """Rows in slots, and rows that wait for one.

    Args:
        slots: decodes.
        size: how many slots there are, at most.
        chooser: chooses rows whose prompts are read together.

    Attributes:
        waiting: rows without a slot.
    """

    def __init__(self, slots: Slots, size: BatchSize, chooser: RowChooser) -> None:
        self.slots, self.size, self.chooser = slots, size, chooser
        self.waiting: deque[Row] = deque()
        self._told = 0  # positions that `take_decoded` has returned

    def add(self, row: Row) -> None:
        """Let a row wait."""
        self.waiting.append(row)

    def choose(self) -> list[Row]:
        """Choose rows whose prompts are to be read now; none if tokens are to be written first."""
        seated = [seat.row for seat in self.slots.active]
        free = self.size.rows - len(seated)
        if seated and free < max(1, self.size.rows // MIN_FREE):
            return []
        self.waiting = deque(row for row in self.waiting if not row.is_done)  # an image may be bad
        return self.chooser.choose(list(self.waiting), free, seated) if self.waiting else []

    def seat(self, rows: Sequence[Row], output: Any) -> list[Seat] | None:
        """Give rows a slot.

        Args:
            rows: as `choose` returned them.
            output: of their prompts; see `Slots.join`.

        Returns:
            Those that are over with their first token; None if they cannot be in slots.
        """
        over, chosen = self.slots.join(rows, output), set(map(id, rows))
        self.waiting = deque(row for row in self.waiting if id(row) not in chosen)
        return over

    def write(self) -> list[Seat]:
        """Write tokens of all rows in slots, and return the rows that are over. The time tells if more are faster."""
        if not (rows := len(self.slots.active)):
            return []
        started, calls = time.monotonic(), self.slots.calls
        over = self.slots.advance()
        self.size.record_step(rows, (time.monotonic() - started) / (self.slots.calls - calls))
        return over

    def take_decoded(self) -> int:
        """Return the positions that were decoded since the last time."""
        found, self._told = self.slots.decoded - self._told, self.slots.decoded
        return found

    def retreat(self, rows: Sequence[Row]) -> int:
        """Use fewer slots, after memory did not suffice, and return for how many rows it did not.

        Args:
            rows: whose prompts were read; they still wait. Without any, or where they were on their way into slots,
                the rows in slots wait again.
        """
        seated = [seat.row for seat in self.slots.active]
        if not rows or not self.slots.is_whole:
            self.slots.clear()
            self.waiting.extendleft(reversed(seated))
        if (number := len(rows) + len(seated)) > 1:
            self.size.halve(number)
        return number
