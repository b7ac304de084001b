"""`SlotCache`: keys and values of rows that begin and end at different times, in one tensor for each layer.

Each row has a slot. All rows write at the same column, and a row's columns end there, whenever it began. To the
language model this is a batch that is padded at the left:

    column      0  1  2  3  4  5  6  7
    slot 0      a  b  c  d  e  f  g          began before the others
    slot 1      .  .  .  .  i  j  k          a row of four positions ended here, and another took its slot
    slot 2      .  .  p  q  r  s  t
                                     └── all write here next

S slots, h heads, C columns of which T are written, k head width, n new rows, L positions of their prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from vlm_cli.modeling.prompt_cache import is_plain

__all__ = ["SlotCache"]

SPARE_COLUMNS = 64  # columns that a cache gets beyond those that it needs


class _SlotLayer(DynamicLayer):
    """One layer, whose keys and values are the written part of larger tensors. The mask cuts a window out of them."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []  # float[S, h, C, k]: keys and values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write float[S, h, 1, k] of all slots into the next column, and return all that is written."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self.buffers = [_resized(x, x, len(x), end) for x in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.show(end)
        return self.buffers[0][:, :, :end], self.buffers[1][:, :, :end]

    def show(self, length: int) -> None:
        """Let the first `length` columns be those that are written."""
        self.keys, self.values = (x[:, :, :length] for x in self.buffers)
        self.is_initialized = True


class SlotCache:
    """The cache of all slots.

    Attributes:
        cache: as the language model takes it; None before the first row.
        num_slots: S.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        self.num_slots = 0

    @property
    def length(self) -> int:
        """T, columns that are written."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @staticmethod
    def takes(source: Any, mask: Tensor) -> bool:
        """Say whether rows that a language model has read can be copied into slots.

        Args:
            source: the language model's cache of the rows.
            mask: bool[n, L] on the CPU, false at padding, which may stand between positions.
        """
        if not is_plain(source) or source.get_seq_length() != mask.shape[1]:
            return False
        # A window drops columns, of padding inside of a row too, so that positions would be missing.
        return not any(is_sliding(layer) for layer in source.layers) or _valid_last(mask) is None

    def write(self, slots: Sequence[int], source: Any, mask: Tensor) -> int:
        """Copy rows into slots, so that their columns end at the last one that is written.

        Args:
            slots: of the rows; those beyond `num_slots` are made.
            source, mask: as for `takes`.

        Returns:
            Columns that were put before all others, since a row has more positions than there were columns.
        """
        longest, order = int(mask.sum(1).max()), _valid_last(mask)
        shift = max(0, longest - self.length)
        length, total = self.length + shift, max(self.num_slots, 1 + max(slots))
        if self.cache is None:
            self.cache = Cache(layers=[_SlotLayer() for _ in source.layers])
        for layer, read in zip(self.cache.layers, source.layers, strict=True):
            buffers: list[Tensor] = []
            for old, states in zip(layer.buffers or [None, None], (read.keys, read.values), strict=True):
                if order is not None:
                    index = order.to(states.device, non_blocking=True)[:, None, :, None]
                    states = states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
                states = states[:, :, -longest:]
                buffer = _resized(old, states, total, length, shift)
                where = torch.tensor(list(slots)).to(states.device, non_blocking=True)
                buffer[:, :, length - states.shape[2] : length].index_copy_(0, where, states)
                buffers.append(buffer)
            layer.buffers = buffers
            layer.show(length)
        self.num_slots = total
        return shift

    def drop(self, columns: int) -> None:
        """Forget the first columns."""
        length = self.length - columns
        for layer in self.cache.layers:
            layer.buffers = [x[:, :, columns:].clone() for x in layer.buffers]
            layer.show(length)

    def select(self, slots: Sequence[int]) -> None:
        """Keep some slots, which get the numbers of their order."""
        length, self.num_slots = self.length, len(slots)
        for layer in self.cache.layers:
            index = torch.tensor(list(slots)).to(layer.buffers[0].device, non_blocking=True)
            layer.buffers = [x.index_select(0, index) for x in layer.buffers]
            layer.show(length)


def _resized(old: Tensor | None, like: Tensor, slots: int, columns: int, shift: int = 0) -> Tensor:
    """Return float[S, h, C, k] with at least so many slots and columns, where the old columns begin at `shift`."""
    if old is not None and len(old) == slots and old.shape[2] >= columns and not shift:
        return old
    buffer = like.new_zeros(slots, like.shape[1], columns + max(SPARE_COLUMNS, columns // 4), like.shape[3])
    if old is not None:
        kept = min(old.shape[2], buffer.shape[2] - shift)
        buffer[: len(old), :, shift : shift + kept] = old[:, :, :kept]
    return buffer


def is_sliding(layer: Any) -> bool:
    """Say whether a layer of a cache keeps its last positions alone."""
    return bool(getattr(layer, "is_sliding", False))


def _valid_last(mask: Tensor) -> Tensor | None:
    """Return the order that puts padding first: bool[n, L] -> int[n, L]; None if it stands first already."""
    if torch.equal(mask.long(), mask.long().cummax(1).values):
        return None
    return mask.to(torch.uint8).argsort(dim=1, stable=True)
