"""`SlotCache`: keys and values of rows that begin and end at different times, in one tensor for each layer.

Each row has a slot. All rows write at the same column, and a row's columns end there, whenever it began. To the
language model this is a batch that is padded at the left:

    column      0  1  2  3  4  5  6  7
    slot 0      a  b  c  d  e  f  g          began before the others
    slot 1      .  .  .  .  i  j  k          a row of four positions ended here, and another took its slot
    slot 2      .  .  p  q  r  s  t
                                     └── all write here next

S slots, h heads, C columns of which T are written, k head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from vlm_cli.modeling.decoding.read_rows import ReadRows, as_index
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
    def takes(rows: ReadRows) -> bool:
        """Say whether the cache of rows can be copied into slots."""
        is_whole = is_plain(rows.cache) and rows.cache.get_seq_length() == rows.mask.shape[1]
        return is_whole and not rows.lacks_positions

    def write(self, slots: Sequence[int], rows: ReadRows) -> int:
        """Copy rows into slots, so that their columns end at the last one that is written.

        Args:
            slots: of the rows; those beyond `num_slots` are made.
            rows: which `takes` approved.

        Returns:
            Columns that were put before all others, since a row has more positions than there were columns.
        """
        shift = max(0, max(rows.lengths) - self.length)
        length, total = self.length + shift, max(self.num_slots, 1 + max(slots))
        if self.cache is None:
            self.cache = Cache(layers=[_SlotLayer() for _ in rows.cache.layers])
        for layer, read in zip(self.cache.layers, rows.cache.layers, strict=True):
            buffers: list[Tensor] = []
            for old, given in zip(layer.buffers or [None, None], (read.keys, read.values), strict=True):
                states = rows.trim(given)
                buffer = _resized(old, states, total, length, shift)
                where = as_index(slots, states.device)
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
            index = as_index(slots, layer.buffers[0].device)
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
