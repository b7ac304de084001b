"""`Slots`: rows of one step that begin and end at different times.

All rows write at the same position of a cache of fixed length. A prompt is read alone, and its keys and values are put
where they end at that position; a mask hides what lies before them. With prompts of 3 and 2 positions, of which b takes
the place of a after two tokens (p: prompt, x: new token, |: the position that is written next):

    row 0    p p p x x | . .    a ends        . . . p p | . .    b begins
    row 1    . p p x x | . .                  . p p x x | . .

Where the cache ends, all rows move to its start. Positions of the language model are counted from each row's own start.

B rows, S positions of the cache, L positions of a prompt, V columns of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer
from transformers.generation.logits_process import LogitsProcessorList

from vlm_cli.modeling.decoding.choosing import choose
from vlm_cli.modeling.decoding.reading import reading
from vlm_cli.modeling.decoding.static import Graph, StaticStep

__all__ = ["Slots", "Written"]


@dataclass(frozen=True)
class Written:
    """What a row wrote since the last look.

    Attributes:
        row: its number.
        tokens: the new ones, a stop token included.
        is_over: whether it ended, by a stop token or its length; its slot is free.
    """

    row: int
    tokens: list[int]
    is_over: bool


class Slots:
    """B rows of a model. Give free rows prompts with `admit`, and let all write with `step`.

    Args:
        model: the VLM.
        rows: B.
        longest: positions of the longest prompt.
        room: tokens of the longest answer.
        stop_ids: tokens that end an answer.
        do_sample: draw tokens, or take the most likely ones.
        processors: change logits in the same way at each token, and of a row only by the tokens that it has: those of
            temperature, top-k, top-p, min-p, suppressed tokens and repetition.
        min_new_tokens: before a stop token.
        look_every: tokens that `step` writes.
        forward: the model itself, or compiled; None for the model.
        graph: captures the step; None to run it each time.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        *,
        longest: int,
        room: int,
        stop_ids: Sequence[int] = (),
        do_sample: bool = False,
        processors: LogitsProcessorList | None = None,
        min_new_tokens: int = 0,
        look_every: int = 8,
        forward: Callable[..., Any] | None = None,
        graph: Graph | None = None,
    ) -> None:
        self.model, self.rows, self.room = model, rows, room
        # A row of any age is at most `longest + room` long, and another that begins then has `room` before it.
        self._step = StaticStep(model, forward or model.__call__, rows, longest + 2 * room, graph)
        self._length, self._at = self._step.length, 0
        self._do_sample, self._every, self._min = do_sample, look_every, min_new_tokens
        self._processors = processors or LogitsProcessorList()
        device = model.device
        self._stop_ids = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        self._ids = torch.zeros(rows, longest + room, dtype=torch.long, device=device)
        self._ends = torch.ones(rows, dtype=torch.long, device=device)  # tokens of the prompts
        self._written = torch.zeros_like(self._ends)
        self._left = [0] * rows  # tokens that a row may still write; 0 for a free row
        self._starts = [0] * rows  # first position of a row in the cache

    @property
    def free(self) -> list[int]:
        """Numbers of the rows that write nothing."""
        return [row for row, left in enumerate(self._left) if not left]

    def release(self, row: int) -> None:
        """Free a row, for instance because its text holds a stop string."""
        self._left[row] = 0

    # -- prompts --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def admit(self, rows: Sequence[int], rooms: Sequence[int] | None = None, **inputs: Any) -> list[Written]:
        """Read prompts into free rows, and write the first token of each.

        Args:
            rows: n numbers of `free`.
            rooms: tokens that each may write; None for the most.
            inputs: of `VLM.generate`, for n prompts.

        Returns:
            The first token of each row.
        """
        with reading(self.model) as found:
            self.model.generate(**inputs, max_new_tokens=1, do_sample=False, cache_implementation="dynamic")
        (prompts,) = found
        length, place = prompts.ids.shape[1], torch.tensor(list(rows), device=self.model.device)
        mask = prompts.kwargs.get("attention_mask")
        own = torch.ones_like(prompts.ids) if mask is None else mask[:, :length].long()
        for row, room, count in zip(rows, rooms or [self.room] * len(rows), own.sum(-1).tolist(), strict=True):
            self._left[row], self._starts[row] = min(room, self.room), self._at - count
        self._make_room(length, set(rows))
        for row, count in zip(rows, own.sum(-1).tolist(), strict=True):
            self._starts[row] = self._at - count
        self._copy_cache(place, prompts.kwargs[self.model.lm_interface.cache_name])
        self._copy_inputs(place, prompts.kwargs, own.bool())
        last = prompts.ids[:, -1:]
        # Where a row has no token yet, it repeats one of its own, which no processor counts twice.
        self._ids[place] = last.expand(-1, self._ids.shape[1])
        self._ids[place, :length] = torch.where(own.bool(), prompts.ids, last)
        self._ends[place], self._written[place] = length, 0
        tokens = torch.zeros_like(self._written)
        tokens[place] = self._choose(prompts.logits, place)
        return self._look([tokens], rows)

    def _make_room(self, length: int, new: set[int]) -> None:
        """Move all rows so that a prompt fits before the position that is written next, and each answer behind it."""
        living = [row for row, left in enumerate(self._left) if left and row not in new]
        at = max([length, *(self._at - self._starts[row] for row in living)])
        if self._at < length or self._at + max(self._left) > self._length:
            self._move(at - self._at)

    def _move(self, offset: int) -> None:
        if offset == 0:
            return
        mask, layers = self._step.inputs.get("attention_mask"), self._step.cache.layers
        for layer in layers:
            if isinstance(layer, StaticLayer) and layer.is_initialized:
                layer.keys.copy_(layer.keys.roll(offset, 2))  # type: ignore[union-attr]
                layer.values.copy_(layer.values.roll(offset, 2))  # type: ignore[union-attr]
        if mask is not None:
            mask.copy_(mask.roll(offset, 1))
            part = mask[:, :offset] if offset > 0 else mask[:, offset:]
            part.fill_(offset < 0)
        self._at += offset
        self._starts = [start + offset for start in self._starts]

    def _copy_cache(self, place: Tensor, cache: Any) -> None:
        layers: Any = zip(self._step.cache.layers, cache.layers, strict=True)
        for mine, theirs in layers:
            if isinstance(mine, StaticLayer) and theirs.keys is not None:
                if not mine.is_initialized:
                    shape = (self.rows, *theirs.keys.shape[1:]), (self.rows, *theirs.values.shape[1:])
                    keys, values = theirs.keys, theirs.values
                    mine.lazy_initialization(*(x.new_empty(s) for x, s in zip((keys, values), shape, strict=True)))
                where = slice(self._at - theirs.keys.shape[2], self._at)
                mine.keys[place, :, where] = theirs.keys  # type: ignore[index]
                mine.values[place, :, where] = theirs.values  # type: ignore[index]
                mine.cumulative_length.fill_(self._at)
            for name in ("conv_states", "recurrent_states"):
                for number, state in getattr(theirs, name, {}).items():
                    if state is not None:
                        self._copy_state(mine, name, number, state, place)

    def _copy_state(self, layer: Any, name: str, number: int, state: Tensor, place: Tensor) -> None:
        if getattr(layer, name)[number] is None:
            whole = state.new_zeros(self.rows, *state.shape[1:])
            layer.lazy_initialization(**{name: whole, "state_idx": number})
            layer.has_previous_state[number] = True
        getattr(layer, name)[number][place] = state

    def _copy_inputs(self, place: Tensor, kwargs: dict[str, Any], own: Tensor) -> None:
        """Copy what the step reads of new rows: masks, positions, media."""
        given = {key: x for key, x in kwargs.items() if key in ("use_cache", "logits_to_keep")}
        mask = torch.ones(len(place), self._length, dtype=torch.long, device=own.device)
        mask[:, : self._at] = nn.functional.pad(own.long(), (self._at - own.shape[1], 0))
        tensors = {"attention_mask": mask, "position_ids": own.sum(-1, keepdim=True)}
        tensors["media_counts"] = kwargs["media_counts"].clamp(max=1)
        if kwargs.get("media") is not None:
            tensors |= self._media_of(kwargs["media"], kwargs.get("media_mask"))
        missing = {key: x.new_zeros(self.rows, *x.shape[1:]) for key, x in tensors.items()}
        missing["attention_mask"].fill_(1)
        if not self._step.inputs:
            self._step.begin(missing | given)
        elif not tensors.keys() <= self._step.inputs.keys():  # the first prompt with media
            self._step.replace(missing | self._step.inputs)
        if "media_mask" in self._step.inputs:
            self._step.inputs["media_mask"][place] = False
        for key, x in tensors.items():
            self._step.inputs[key][place] = x

    def _media_of(self, media: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Return the media of new rows as one medium each, padded to as many vision tokens as rows have."""
        size = media.shape[-2]  # [n, blocks, 2, h, S_media, k]
        mask = media.new_ones(len(media), size, dtype=torch.bool) if mask is None else mask.flatten(1)
        kept = self._step.inputs.get("media")
        most = size if kept is None else kept.shape[-2]
        if size > most:
            self._widen_media(size - most)
        media = nn.functional.pad(media, (0, 0, 0, max(most - size, 0)))
        mask = nn.functional.pad(mask, (0, max(most - size, 0)))
        return {"media": media, "media_mask": mask[:, None]}

    def _widen_media(self, more: int) -> None:
        inputs = dict(self._step.inputs)
        inputs["media"] = nn.functional.pad(inputs["media"], (0, 0, 0, more))
        inputs["media_mask"] = nn.functional.pad(inputs["media_mask"], (0, more))
        self._step.replace(inputs)

    # -- tokens ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> list[Written]:
        """Write tokens in all rows, and look at them.

        Returns:
            What each row wrote that was not free.
        """
        living = [row for row, left in enumerate(self._left) if left]
        if not living:
            return []
        tokens = []
        for _ in range(min(self._every, max(self._left))):
            last = self._ids.gather(1, (self._ends + self._written - 1)[:, None])
            logits = self._step(last)
            self._at += 1
            tokens.append(self._choose(logits, None))
        return self._look(tokens, living)

    def _choose(self, logits: Tensor, place: Tensor | None) -> Tensor:
        """Choose and keep the next tokens of some rows, or of all: float[n, V] -> int[n]."""
        place = torch.arange(self.rows, device=logits.device) if place is None else place
        ids, written = self._ids[place], self._written[place]
        logits = logits.to(copy=True, dtype=torch.float32)
        logits[:, self.model.config.media_token_id] = -torch.inf  # `<image>` is never written
        scores: Any = self._processors(ids, logits)  # type: ignore[arg-type]
        if self._min and len(self._stop_ids):
            stops = torch.zeros_like(scores[0], dtype=torch.bool).index_fill(0, self._stop_ids, True)
            scores = scores.masked_fill((written < self._min)[:, None] & stops, -torch.inf)
        tokens = choose(scores, do_sample=self._do_sample)
        where = (self._ends[place] + written).clamp(max=self._ids.shape[1] - 1)  # a free row goes on in its last place
        self._ids[place, where] = tokens
        self._written[place] = torch.minimum(written + 1, self._ids.shape[1] - self._ends[place])
        return tokens

    def _look(self, tokens: Sequence[Tensor], rows: Sequence[int]) -> list[Written]:
        stops, found = set(self._stop_ids.tolist()), []
        new = torch.stack(list(tokens), dim=1).tolist()
        for row in rows:
            mine = new[row][: self._left[row]]
            end = next((i for i, token in enumerate(mine) if token in stops), None)
            mine = mine if end is None else mine[: end + 1]
            self._left[row] = 0 if end is not None else self._left[row] - len(mine)
            found.append(Written(row, mine, not self._left[row]))
        return found
