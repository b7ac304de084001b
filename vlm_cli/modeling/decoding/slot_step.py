"""`SlotStep`: one token for each of S slots, whose rows begin and end at different times.

A step owns the language model's cache, the media and the place of each row. Whoever calls it owns the rows: which one
has which slot, what its next token is, and when it ends (`vlm_cli.generation.slots`).

There are two, since no cache serves both kinds of device. On a CPU, attention over columns that hold nothing costs as
much as over others, and a call of Python costs little beside the products; so `GrowingSlots` has a cache of the columns
that are written. On a GPU, the launches of a call cost more than its products; so `StaticSlots` has a cache of fixed
length, with which one CUDA graph holds the whole call.

S slots, n new rows, V columns of the logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from vlm_cli.modeling.decoding.read_rows import ReadRows

__all__ = ["SlotStep"]


class SlotStep(ABC):
    """One token for each of S slots.

    Attributes:
        num_slots: S.
    """

    num_slots: int = 0

    @abstractmethod
    def takes(self, rows: ReadRows) -> bool:
        """Say whether the cache of rows can be copied into slots."""

    @abstractmethod
    def put(self, slots: Sequence[int], rows: ReadRows) -> None:
        """Copy rows into free slots; those beyond `num_slots` are made.

        Args:
            slots: n numbers.
            rows: n rows, which `takes` approved.
        """

    @abstractmethod
    def release(self, slot: int) -> None:
        """Free a slot. It goes on with the others, and what it writes has no meaning."""

    def compact(self) -> list[int] | None:
        """Drop free slots, if that makes a step cheaper.

        Returns:
            The slots that are left, which get the numbers of their order; None if all are.
        """
        return None

    @abstractmethod
    def __call__(self, tokens: Tensor) -> Tensor:
        """Read the newest token of each slot, int[S], and return the logits of the next: float[S, V].

        The next call may overwrite them.
        """
