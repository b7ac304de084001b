"""`Slots`: a fixed number of rows that are decoded together; a row that ends makes room for another.

Each call of the language model writes one token of each slot.
S slots, T columns of the cache, V columns of the logits, n new rows, k head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_cli.generation.slot_cache import SlotCache

if TYPE_CHECKING:
    from transformers.generation.logits_process import LogitsProcessorList

    from vlm_cli.generation.rows import Row
    from vlm_cli.modeling.vlm import VLM

__all__ = ["Chooser", "Seat", "Slots"]

LOOK_EVERY = 8  # tokens between two looks of the host at a device that is not a CPU
MIN_DROPPED = 32  # columns that no row needs before the cache is copied without them


@dataclass(eq=False)
class Seat:
    """A row in a slot.

    Attributes:
        row: the row.
        start: column of its first position.
        numbers: float[room], random numbers of its tokens; None if none are drawn.
        tokens: of the answer so far.
    """

    row: Row
    start: int
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
        choose: chooses tokens.
        is_over: says whether the newest tokens of a row end its answer: gets the row, its tokens, and how many are new.
        look_every: tokens between two looks of the host at the device; None for what suits the device.

    Attributes:
        seats: the row in each slot; None in a free one.
        calls: of the language model, one for each token of the slots.
        decoded: positions that these calls computed, those of free slots too.
    """

    def __init__(
        self,
        model: VLM,
        choose: Chooser,
        is_over: Callable[[Row, list[int], int], bool],
        *,
        look_every: int | None = None,
    ) -> None:
        self.model, self.choose, self.is_over = model, choose, is_over
        self.look_every = look_every or (1 if model.device.type == "cpu" else LOOK_EVERY)
        self.calls = self.decoded = 0
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.cache = SlotCache()
        self.seats: list[Seat | None] = []
        self.tokens = torch.zeros(0, dtype=torch.long, device=self.model.device)  # [S], the newest of each slot
        self.counts = torch.zeros_like(self.tokens)  # [S], media of each row
        self.media: Tensor | None = None
        self.media_mask: Tensor | None = None  # [S, T_img, n]

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
        source, mask = self.model.lm_interface.cache_in(output), output.attention_mask.bool()
        if not SlotCache.takes(source, mask):
            return None
        free = [i for i, seat in enumerate(self.seats) if seat is None]
        slots = [*free, *range(len(self.seats), len(self.seats) + len(rows))][: len(rows)]
        shift = self.cache.write(slots, source, mask)
        self.seats += [None] * (self.cache.num_slots - len(self.seats))
        for seat in self.active:
            seat.start += shift
        lengths = mask.sum(1).tolist()
        seats = [
            Seat(row, self.cache.length - length, self.choose.numbers(row))
            for row, length in zip(rows, lengths, strict=True)
        ]
        first = self.choose(output.logits[0], self._numbers(seats))
        media, media_mask = self.model.media_for_decoding(output.media, output.media_mask)
        where = torch.tensor(slots).to(first.device, non_blocking=True)
        self._share(where, media, media_mask)
        self.tokens = _put(self.tokens, where, first, len(self.seats))
        self.counts = _put(self.counts, where, output.media_counts.to(first.device), len(self.seats))
        for slot, seat in zip(slots, seats, strict=True):
            self.seats[slot] = seat
        return self._take(dict(zip(slots, first[:, None].tolist(), strict=True)))

    def advance(self) -> list[Seat]:
        """Write the next tokens of all rows, and return the rows that are over."""
        self._tidy()
        most = min(self.look_every, *(seat.left for seat in self.active))
        written = [self._step(i) for i in range(most)]
        tokens = torch.stack(written, dim=1).tolist()  # [S][most]
        return self._take({slot: tokens[slot] for slot, seat in enumerate(self.seats) if seat is not None})

    def _step(self, ahead: int) -> Tensor:
        """Write one token of each slot: int[S]. The host has not seen the last `ahead` ones."""
        length, device = self.cache.length, self.tokens.device
        # A free slot sees what it writes alone.
        starts = torch.tensor([length if seat is None else seat.start for seat in self.seats])
        mask = torch.arange(length + 1) >= starts[:, None]  # [S, T + 1]
        inputs = self.model.prepare_inputs_for_generation(
            self.tokens[:, None],
            next_sequence_length=1,
            attention_mask=mask.long().to(device, non_blocking=True),
            position_ids=(length - starts)[:, None].to(device, non_blocking=True),
            media=self.media,
            media_mask=self.media_mask,
            media_counts=self.counts[:, None],
            use_cache=True,
            **{self.model.lm_interface.cache_name: self.cache.cache},
        )
        logits = self.model(**inputs, return_dict=True).logits[:, -1]
        self.tokens = self.choose(logits, self._numbers(self.seats, ahead))
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
        return over

    def _tidy(self) -> None:
        """Drop slots and columns that no row needs."""
        kept = [i for i, seat in enumerate(self.seats) if seat is not None]
        if len(kept) <= len(self.seats) // 2:
            self.cache.select(kept)
            index = torch.tensor(kept).to(self.tokens.device, non_blocking=True)
            self.seats = [self.seats[i] for i in kept]
            self.tokens, self.counts = self.tokens[index], self.counts[index]
            if self.media is not None and self.media_mask is not None:
                self.media, self.media_mask = self.media[index], self.media_mask[index]
        unused = min(seat.start for seat in self.active)
        if unused >= max(MIN_DROPPED, self.cache.length // 4):
            self.cache.drop(unused)
            for seat in self.active:
                seat.start -= unused

    def _share(self, where: Tensor, media: Tensor | None, mask: Tensor | None) -> None:
        """Put the media of new rows beside those of the others; what is shorter is padded.

        Args:
            where: int[n], slots of the new rows.
            media: float[n, …, T_img·n, k] as `media_for_decoding` returns them; None for none.
            mask: bool[n, T_img, n] of them.
        """
        total = len(self.seats)
        if media is None or mask is None:
            if self.media is None or self.media_mask is None:
                return
            media = self.media.new_zeros(len(where), *self.media.shape[1:])
            mask = self.media_mask.new_zeros(len(where), *self.media_mask.shape[1:])
        if self.media is None or self.media_mask is None:
            self.media, self.media_mask = media[:0], mask[:0]
        shape = [max(pair) for pair in zip(self.media_mask.shape[1:], mask.shape[1:], strict=True)]
        (old, old_mask), (new, new_mask) = (
            _padded(x, m, shape) for x, m in ((self.media, self.media_mask), (media, mask))
        )
        self.media, self.media_mask = _put(old, where, new, total), _put(old_mask, where, new_mask, total)


def _put(old: Tensor, where: Tensor, new: Tensor, total: int) -> Tensor:
    """Put rows at their places: *[S, …], int[n], *[n, …] -> *[total, …], 0 at places that are new and free."""
    if len(old) < total:
        old = torch.cat([old, new.new_zeros(total - len(old), *new.shape[1:])])
    return old.index_copy(0, where, new)


def _padded(media: Tensor, mask: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pad media to so many media of so many vision tokens each."""
    if tuple(mask.shape[1:]) == tuple(shape):
        return media, mask
    more = [wanted - has for wanted, has in zip(shape, mask.shape[1:], strict=True)]
    apart = media.unflatten(-2, mask.shape[1:])  # [S, …, T_img, n, k]
    apart = torch.nn.functional.pad(apart, (0, 0, 0, more[1], 0, more[0]))
    return apart.flatten(-3, -2), torch.nn.functional.pad(mask, (0, more[1], 0, more[0]))
