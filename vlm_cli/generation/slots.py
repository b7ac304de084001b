"""`Slots`: a fixed number of rows that are decoded together; a row that ends makes room for another.

This module knows which row has which slot, which tokens it gets, and when it ends. `SlotStep` knows how the language
model writes one token of each slot, and where it keeps what it has read.

S slots, V columns of the logits, n new rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_cli.modeling.decoding.read_rows import ReadRows, as_index, put_rows
from vlm_cli.modeling.decoding.slot_step import SlotStep

if TYPE_CHECKING:
    from transformers.generation.logits_process import LogitsProcessorList

    from vlm_cli.generation.rows import Row
    from vlm_cli.modeling.vlm import VLM

__all__ = ["Chooser", "Seat", "Slots"]

LOOK_EVERY = 8  # tokens between two looks of the host at a device that is not a CPU


@dataclass(eq=False)
class Seat:
    """A row in a slot.

    Attributes:
        row: the row.
        numbers: float[room], random numbers of its tokens; None if none are drawn.
        tokens: of the answer so far.
    """

    row: Row
    numbers: Tensor | None = None
    tokens: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens that the answer may still have."""
        return self.row.room - len(self.tokens)


class Chooser:
    """Chooses tokens; where they are drawn, each row has its own random numbers, whatever rows stand beside it.

    Args:
        processors: change the logits of a row, and look at no other token of it.
        do_sample: draw tokens, instead of the most likely ones.
        seed: of the random numbers, together with the line of a row; None for others in each run.
    """

    def __init__(self, processors: LogitsProcessorList, *, do_sample: bool, seed: int | None = None) -> None:
        self.processors, self.do_sample, self.seed = processors, do_sample, seed

    def numbers(self, row: Row) -> Tensor | None:
        """Return the random numbers of an answer: float[room] in [0, 1); None if no token is drawn."""
        if not self.do_sample:
            return None
        source = torch.Generator()
        if self.seed is None:
            source.seed()
        else:
            source.manual_seed((self.seed + row.line) % 2**32)
        return torch.rand(row.room, generator=source)

    def __call__(self, logits: Tensor, numbers: Tensor | None) -> Tensor:
        """Choose a token of each row.

        Args:
            logits: float[S, V].
            numbers: float[S], a random number of each row; None where no token is drawn.

        Returns:
            int[S].
        """
        none: Any = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
        scores: Any = self.processors(none, logits.float())
        if numbers is None:
            return scores.argmax(-1)
        sums = scores.softmax(-1).cumsum(-1)  # [S, V]
        drawn = torch.searchsorted(sums, (numbers.to(sums) * sums[:, -1])[:, None], right=True)[:, 0]
        return drawn.clamp(max=scores.shape[-1] - 1)


class Slots:
    """Rows at different places of their answers.

    Args:
        model: the VLM.
        make_step: makes what writes one token of each slot.
        choose: chooses tokens.
        is_over: says whether the newest tokens of a row end its answer: gets the row, its tokens, and how many are new.
        look_every: tokens between two looks of the host at the device; None for what suits the device.

    Attributes:
        seats: the row in each slot; None in a free one.
        is_whole: whether no error has left new rows in the middle of their way into slots; `clear` helps.
        calls: of the language model, one for each token of the slots.
        decoded: positions that these calls computed, those of free slots too.
    """

    def __init__(
        self,
        model: VLM,
        make_step: Callable[[], SlotStep],
        choose: Chooser,
        is_over: Callable[[Row, list[int], int], bool],
        *,
        look_every: int | None = None,
    ) -> None:
        self.model, self.make_step, self.choose, self.is_over = model, make_step, choose, is_over
        self.look_every = look_every or (1 if model.device.type == "cpu" else LOOK_EVERY)
        self.calls = self.decoded = 0
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.step = self.make_step()
        self.is_whole = True
        self.seats: list[Seat | None] = []
        self.tokens = torch.zeros(0, dtype=torch.long, device=self.model.device)  # [S], the newest of each slot

    @property
    def active(self) -> list[Seat]:
        """The rows that are not over."""
        return [seat for seat in self.seats if seat is not None]

    def join(self, rows: Sequence[Row], output: Any) -> list[Seat] | None:
        """Give slots to rows whose prompts are read.

        Args:
            rows: those of a batch.
            output: what `VLM.generate` returned for it and one token, with its logits.

        Returns:
            The rows whose answers are over with their first token; None if the cache cannot be copied into slots.
        """
        read = ReadRows.of(self.model, output)
        if not self.step.takes(read):
            return None
        seats = [Seat(row, self.choose.numbers(row)) for row in rows]
        first = self.choose(output.logits[0], self._numbers(seats))
        free = [i for i, seat in enumerate(self.seats) if seat is None]
        slots = [*free, *range(len(self.seats), len(self.seats) + len(rows))][: len(rows)]
        self.is_whole = False
        self.step.put(slots, read)
        self.seats += [None] * (self.step.num_slots - len(self.seats))
        self.tokens = put_rows(self.tokens, as_index(slots, first.device), first, len(self.seats))
        for slot, seat in zip(slots, seats, strict=True):
            self.seats[slot] = seat
        self.is_whole = True
        return self._take(dict(zip(slots, first[:, None].tolist(), strict=True)))

    def advance(self) -> list[Seat]:
        """Write the next tokens of all rows, and return the rows that are over."""
        if (kept := self.step.compact()) is not None:
            self.seats, self.tokens = [self.seats[i] for i in kept], self.tokens[as_index(kept, self.tokens.device)]
        most = min(self.look_every, *(seat.left for seat in self.active))
        written = [self._write(i) for i in range(most)]
        tokens = torch.stack(written, dim=1).tolist()  # [S][most]
        return self._take({slot: tokens[slot] for slot, seat in enumerate(self.seats) if seat is not None})

    def _write(self, ahead: int) -> Tensor:
        """Write one token of each slot: int[S]. The host has not seen the last `ahead` ones."""
        self.tokens = self.choose(self.step(self.tokens), self._numbers(self.seats, ahead))
        self.calls += 1
        self.decoded += len(self.seats)
        return self.tokens

    def _numbers(self, seats: Sequence[Seat | None], ahead: int = 0) -> Tensor | None:
        """Return the next random number of each slot, 0 in a free one: float[S]; None if no token is drawn."""
        if not self.choose.do_sample:
            return None
        found = torch.zeros(len(seats))
        for slot, seat in enumerate(seats):
            if seat is not None and seat.numbers is not None:
                found[slot] = seat.numbers[len(seat.tokens) + ahead]
        return found.to(self.model.device, non_blocking=True)

    def _take(self, tokens: dict[int, list[int]]) -> list[Seat]:
        """Add new tokens to the rows of slots, and free the slots of rows that are over."""
        over = []
        for slot, new in tokens.items():
            seat = self.seats[slot]
            assert seat is not None
            seat.tokens += new
            if not seat.left or self.is_over(seat.row, seat.tokens, len(new)):
                over.append(seat)
                self.seats[slot] = None
                self.step.release(slot)
        return over
