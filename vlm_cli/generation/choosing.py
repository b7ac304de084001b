"""Which of the rows that wait are answered together: those of similar length, as many as memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from vlm_cli.generation.batch_media import count_token_bytes
from vlm_cli.generation.batch_size import RowCost, available_memory
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.generation.rows import Row
from vlm_cli.modeling.language_model import NO_LEFT_PADDING

__all__ = ["ONE_AT_A_TIME", "RowChooser"]

#: Types of language models that Transformers itself cannot run on several rows at once, and why.
ONE_AT_A_TIME = {
    "rwkv": "the state of one row is carried over to others",
    "xlstm": "its state has one row",
}

AnyRow = TypeVar("AnyRow", bound=Row)


class RowChooser:
    """Chooses rows for one model.

    Args:
        plan: how the model answers.
        sequences: beams, or answers, of each row.
        pads: rows of different lengths may stand together, where the language model allows it.
    """

    def __init__(self, plan: GenerationPlan, *, sequences: int = 1, pads: bool = True) -> None:
        self.plan, self.model = plan, plan.model
        kind = self.model.lang_model.config.model_type
        self.most = 1 if kind in ONE_AT_A_TIME else None
        self.pads = pads and kind not in NO_LEFT_PADDING
        self.cost = RowCost(self.model, sequences)

    def choose(self, rows: Sequence[AnyRow], most: int, beside: Sequence[Row] = ()) -> list[AnyRow]:
        """Choose the first row, so that no row waits for long, and the rows that are nearest to it in length.

        Args:
            rows: that wait, at least one.
            most: rows to choose at most.
            beside: rows that the model answers already and that have their memory; without any, one row is chosen even
                if memory may not suffice.
        """
        first = rows[0]

        def distance(row: Row) -> int:
            of_media, of_first = row.positions - len(row.ids), first.positions - len(first.ids)
            return abs(len(row.ids) - len(first.ids)) + abs(of_media - of_first)

        fitting = rows if self.pads else [row for row in rows if not distance(row)]
        chosen = sorted(fitting, key=distance)[: self.most or most]
        memory = available_memory(self.model.device) / 2
        while len(chosen) > (not beside) and not self._fits(chosen, memory, beside):
            chosen.pop()
        return chosen

    def _fits(self, rows: Sequence[Row], memory: float, beside: Sequence[Row]) -> bool:
        """Tell whether rows, padded to each other, stay within so many bytes and within the context."""
        budget, room = self.plan.budget, max(row.room for row in rows)
        positions = budget.positions_together([(len(row.ids), row.positions) for row in rows]) + room
        left = budget.left(positions)
        if left is not None and left < 0:
            return False
        longest = max(positions, max((row.positions + row.room for row in beside), default=0))
        media_bytes = max(sum(count_token_bytes(self.model, size) for size in row.media) for row in rows)
        return len(rows) * self.cost(longest, media_bytes) <= memory
