"""`StaticSlots`: the step of slots in tensors of fixed sizes, so that one CUDA graph holds it.

All rows write at the same column of a cache of fixed length. A prompt's keys and values are put where they end at that
column; a mask hides what lies before them. With prompts of 3 and 2 positions, of which b takes the place of a after two
tokens (p: prompt, x: new token, |: the column that is written next):

    slot 0    p p p x x | . .    a ends        . . . p p | . .    b begins
    slot 1    . p p x x | . .                  . p p x x | . .

Where the cache ends, all rows move to its start. Positions of the language model are counted from each row's own start.

S slots, C columns of the cache, V columns of the logits, n new rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from vlm_cli.modeling.decoding.read_rows import ReadRows, RowMedia, as_index
from vlm_cli.modeling.decoding.slot_step import SlotStep
from vlm_cli.modeling.decoding.static import Graph, StaticStep, make_static_cache

__all__ = ["StaticSlots"]

MIN_SPARE = 32  # columns behind the rows when they move, so that they move seldom
_STATES = ("conv_states", "recurrent_states")  # of a layer that remembers a row in a state


class StaticSlots(SlotStep):
    """See `SlotStep`. Where rows do not fit, the tensors are made anew with room for more, and captured anew.

    Args:
        model: the VLM.
        forward: the model itself, or compiled; None for the model.
        graph: captures the step; None to run it each time.
    """

    def __init__(self, model: Any, *, forward: Callable[..., Any] | None = None, graph: Graph | None = None) -> None:
        self.model, self._forward, self._graph = model, forward or model.__call__, graph
        self._step: StaticStep | None = None
        self._at = 0  # the column that is written next
        self._starts: list[int | None] = []  # column of the first position of each row; None in a free slot
        self._is_taken = torch.zeros(0, 1, dtype=torch.long, device=model.device)

    def takes(self, rows: ReadRows) -> bool:
        mine, theirs = make_static_cache(self.model.lang_model.config, 1).layers, getattr(rows.cache, "layers", ())
        fits = len(mine) == len(theirs) and all(map(_can_hold, mine, theirs))
        return fits and not rows.lacks_positions

    # -- rows -----------------------------------------------------------------------------------------------------

    def put(self, slots: Sequence[int], rows: ReadRows) -> None:
        total = max(self.num_slots, 1 + max(slots))
        if total > self.num_slots:
            total = max(total, self.num_slots * 5 // 4)  # not anew for each row more
        self._make_room(max(rows.lengths), total)
        step, where = self._step, as_index(slots, self.model.device)
        assert step is not None
        pairs: Any = zip(step.cache.layers, rows.cache.layers, strict=True)
        for mine, theirs in pairs:
            self._put_layer(mine, theirs, slots, rows)
        lengths = torch.tensor(rows.lengths)[:, None]
        mask = torch.arange(step.length) >= self._at - lengths  # [n, C]; what follows is hidden until it is written
        for name, x in {"attention_mask": mask.long(), "position_ids": lengths}.items():
            step.inputs[name].index_copy_(0, where, x.to(where.device, non_blocking=True))
        step.inputs["media_counts"].index_copy_(0, where, rows.media_counts)
        self._put_media(where, rows)
        self._is_taken.index_fill_(0, where, 1)
        for slot, length in zip(slots, rows.lengths, strict=True):
            self._starts[slot] = self._at - length

    def _put_layer(self, mine: Any, theirs: Any, slots: Sequence[int], rows: ReadRows) -> None:
        if _attends(mine, theirs):
            keys, values = rows.trim(theirs.keys), rows.trim(theirs.values)
            if not mine.is_initialized:
                _begin(mine, keys, values, self.num_slots)
            where, columns = as_index(slots, keys.device), slice(self._at - keys.shape[2], self._at)
            mine.keys[:, :, columns].index_copy_(0, where, keys)
            mine.values[:, :, columns].index_copy_(0, where, values)
            mine.cumulative_length.fill_(self._at)
        _put_states(mine, theirs, slots, self.num_slots)

    def _put_media(self, where: Tensor, rows: ReadRows) -> None:
        step = self._step
        assert step is not None
        kept = RowMedia(step.inputs["media"], step.inputs["media_mask"]) if "media" in step.inputs else None
        if (pair := rows.media_beside(kept)) is None:
            return
        old, new = pair
        if old is kept:
            old.values.index_copy_(0, where, new.values)
            old.mask.index_copy_(0, where, new.mask)
            return
        media = old.put(where, new, self.num_slots)  # the first media, or more of them than before
        step.replace({**step.inputs, "media": media.values, "media_mask": media.mask})

    def release(self, slot: int) -> None:
        self._starts[slot] = None
        self._is_taken[slot] = 0

    # -- room -----------------------------------------------------------------------------------------------------

    def _make_room(self, least: int, total: int) -> None:
        """Let the rows of so many slots end at column `least` or behind it, with free columns behind them."""
        length = 0 if self._step is None else self._step.length
        needed = max([least, *(self._at - start for start in self._starts if start is not None)])
        if total == self.num_slots and needed <= self._at < length:
            return
        if needed + MIN_SPARE > length:
            length = needed + max(MIN_SPARE, needed // 2)
        offset, before, old = needed - self._at, self._at, self._step
        if old is None or (total, length) != (old.rows, old.length):
            self._step = self._make_step(total, length)
        self._at, self.num_slots = needed, total
        self._starts = [None if start is None else start + offset for start in self._starts]
        self._starts += [None] * (total - len(self._starts))
        if old is not None:
            self._move(old, slice(max(0, -offset), before), slice(max(0, offset), needed))

    def _make_step(self, rows: int, length: int) -> StaticStep:
        """Make a step whose rows see nothing before the column that is written next."""
        graph = self._graph if self._step is None else self._step.graph  # None after a capture that failed
        step, device = StaticStep(self.model, self._forward, rows, length, graph), self.model.device
        zeros = torch.zeros(rows, 1, dtype=torch.long, device=device)
        mask = torch.ones(rows, step.length, dtype=torch.long, device=device)
        step.begin({"attention_mask": mask, "position_ids": zeros, "media_counts": zeros, "use_cache": True})
        self._is_taken = _extend(self._is_taken, rows)
        return step

    def _move(self, old: StaticStep, source: slice, target: slice) -> None:
        """Bring columns of a step to other ones of the present step, which may be the same."""
        step = self._step
        assert step is not None
        seen = old.inputs["attention_mask"][:, source].clone()
        mask = step.inputs["attention_mask"].fill_(1)
        mask[:, : target.stop] = 0
        mask[: old.rows, target] = seen
        if step is not old:
            others = {name: _extend(x, step.rows) for name, x in old.inputs.items() if name != "attention_mask"}
            step.replace({"attention_mask": mask, **others})
        pairs: Any = zip(step.cache.layers, old.cache.layers, strict=True)
        for mine, theirs in pairs:
            if _attends(mine, theirs):
                keys, values = theirs.keys[:, :, source].clone(), theirs.values[:, :, source].clone()
                if mine is not theirs:
                    theirs.keys = theirs.values = None  # so that one layer at a time exists twice
                    _begin(mine, keys, values, step.rows)
                mine.keys[: old.rows, :, target] = keys
                mine.values[: old.rows, :, target] = values
                mine.cumulative_length.fill_(self._at)
            if mine is not theirs:
                _put_states(mine, theirs, range(old.rows), step.rows)

    # -- tokens ---------------------------------------------------------------------------------------------------

    def __call__(self, tokens: Tensor) -> Tensor:
        self._make_room(0, self.num_slots)
        assert self._step is not None
        # The positions of a free slot would count beyond those that the language model knows.
        self._step.inputs["position_ids"].mul_(self._is_taken)
        logits = self._step(tokens[:, None])
        self._at += 1
        return logits


def _can_hold(mine: Any, theirs: Any) -> bool:
    """Say whether a layer of a static cache holds what a layer of a language model's own cache holds."""
    if type(theirs) in (DynamicLayer, DynamicSlidingWindowLayer):
        return type(mine) is StaticLayer
    return type(mine) is type(theirs) and not isinstance(mine, StaticLayer)


def _attends(mine: Any, theirs: Any) -> bool:
    """Say whether a layer has keys and values to copy."""
    return isinstance(mine, StaticLayer) and theirs.keys is not None


def _begin(layer: Any, keys: Tensor, values: Tensor, rows: int) -> None:
    """Make the keys and values of so many rows, like some."""
    layer.lazy_initialization(*(x.new_empty(rows, *x.shape[1:]) for x in (keys, values)))


def _put_states(mine: Any, theirs: Any, slots: Sequence[int], rows: int) -> None:
    """Copy the states of rows into slots of a layer, of which there are so many."""
    for name in _STATES:
        for number, state in getattr(theirs, name, {}).items():
            if state is None:
                continue
            kept = getattr(mine, name)
            if kept[number] is None:
                like = state.new_zeros(rows, *state.shape[1:])
                mine.lazy_initialization(**{name: like, "state_idx": number})
                mine.has_previous_state[number] = True
            kept[number].index_copy_(0, as_index(slots, state.device), state)


def _extend(x: Tensor, rows: int) -> Tensor:
    """Add rows of zeros: *[S, …] -> *[rows, …]."""
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
