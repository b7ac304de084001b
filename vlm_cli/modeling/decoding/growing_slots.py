"""`GrowingSlots`: the step of slots with a cache that grows, for a CPU.

S slots, T columns of the cache, V columns of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_cli.modeling.decoding.read_rows import ReadRows, RowMedia, as_index, put_rows
from vlm_cli.modeling.decoding.slot_cache import SlotCache
from vlm_cli.modeling.decoding.slot_step import SlotStep

__all__ = ["GrowingSlots"]

MIN_DROPPED = 32  # columns that no row needs before the cache is copied without them


class GrowingSlots(SlotStep):
    """See `SlotStep`. Slots and columns that no row needs are dropped.

    Args:
        model: the VLM.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, SlotCache()
        self._starts: list[int | None] = []  # column of the first position of each row; None in a free slot
        self._counts = torch.zeros(0, 1, dtype=torch.long, device=model.device)
        self._media: RowMedia | None = None

    def takes(self, rows: ReadRows) -> bool:
        return SlotCache.takes(rows)

    def put(self, slots: Sequence[int], rows: ReadRows) -> None:
        shift = self.cache.write(slots, rows)
        self.num_slots = self.cache.num_slots
        self._starts = [None if start is None else start + shift for start in self._starts]
        self._starts += [None] * (self.num_slots - len(self._starts))
        for slot, length in zip(slots, rows.lengths, strict=True):
            self._starts[slot] = self.cache.length - length
        where = as_index(slots, self._counts.device)
        self._counts = put_rows(self._counts, where, rows.media_counts, self.num_slots)
        if (media := rows.media_beside(self._media)) is not None:
            old, new = media
            self._media = old.put(where, new, self.num_slots)

    def release(self, slot: int) -> None:
        self._starts[slot] = None

    def compact(self) -> list[int] | None:
        starts = {slot: start for slot, start in enumerate(self._starts) if start is not None}
        kept = list(starts) if len(starts) <= self.num_slots // 2 else None
        if kept is not None:
            self._select(kept)
        unused = min(starts.values(), default=0)
        if unused >= max(MIN_DROPPED, self.cache.length // 4):
            self.cache.drop(unused)
            self._starts = [None if start is None else start - unused for start in self._starts]
        return kept

    def _select(self, slots: Sequence[int]) -> None:
        self.cache.select(slots)
        self.num_slots, index = len(slots), as_index(slots, self._counts.device)
        self._starts, self._counts = [self._starts[slot] for slot in slots], self._counts[index]
        if self._media is not None:
            self._media = RowMedia(self._media.values[index], self._media.mask[index])

    def __call__(self, tokens: Tensor) -> Tensor:
        length, device = self.cache.length, tokens.device
        # A free slot sees what it writes alone.
        starts = torch.tensor([length if start is None else start for start in self._starts])
        mask = torch.arange(length + 1) >= starts[:, None]  # [S, T + 1]
        inputs = self.model.prepare_inputs_for_generation(
            tokens[:, None],
            next_sequence_length=1,
            attention_mask=mask.long().to(device, non_blocking=True),
            position_ids=(length - starts)[:, None].to(device, non_blocking=True),
            media=None if self._media is None else self._media.values,
            media_mask=None if self._media is None else self._media.mask,
            media_counts=self._counts,
            use_cache=True,
            **{self.model.lm_interface.cache_name: self.cache.cache},
        )
        logits: Tensor = self.model(**inputs, return_dict=True).logits[:, -1]
        return logits
