"""`PromptCache`: the key-value cache of a prompt, kept for the next prompt that starts with the same text and media.

A chat's turns start alike, and so do rows with the same few-shot examples. After the prompt `a I I I b c`, whose image
takes three positions (I), the cache serves

    a I I I b d      5 positions, if the image is the same, bit for bit
    a I I I x        4 positions
    a J J J b c      1 position: the image is another

B rows, L positions of the language model, n vision tokens per medium, d channels.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vlm_cli.modeling.deduplicate import moved

__all__ = ["MIN_SHARED_POSITIONS", "PromptCache", "PromptRow", "Reuse", "ShownMedia", "is_plain"]

MIN_SHARED_POSITIONS = 8  # positions that rows must share before one call reads them for all rows


@dataclass(frozen=True)
class PromptRow:
    """One row of a prompt, over the positions of the language model and without padding.

    Attributes:
        ids: int[L], with as many `<image>` for each medium as it takes positions.
        media_counts: int[L], number of `<image>` at or before each position.
        media: the vision tokens of each medium, float[n, d] without padding, or a key that equal media share.
        num_positions: positions that each medium takes.
    """

    ids: Tensor
    media_counts: Tensor
    media: Sequence[Any] = ()
    num_positions: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> PromptRow:
        """Return the first `length` positions."""
        return PromptRow(self.ids[:length], self.media_counts[:length], self.media, self.num_positions)

    def length_before_media(self, length: int) -> int:
        """Return `length`, or the positions before the medium that the first `length` positions would cut."""
        ends = torch.tensor([0, *self.num_positions]).cumsum(0)
        count = int(self.media_counts[length - 1]) if length else 0
        if count in ends.tolist():
            return length
        start = int(ends[ends < count].max())
        return int((self.media_counts <= start).sum())

    def shared_with(self, other: PromptRow) -> int:
        """Count the positions at which two rows start alike; a medium counts if all its vision tokens are equal."""
        length = min(len(self), len(other))
        same = (self.ids[:length] == other.ids.to(self.ids.device)[:length]).cumprod(0)
        num_alike = 0  # positions of equal media
        for mine, theirs, num in zip(self.media, other.media, self.num_positions, strict=False):
            if not _is_same(mine, theirs):
                break
            num_alike += num
        known = self.media_counts[:length] <= num_alike
        return int((same * known).cumprod(0).sum())


def _is_same(mine: Any, theirs: Any) -> bool:
    """Compare the vision tokens of two media, or their keys."""
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return torch.equal(mine, theirs)
    return bool(type(mine) is type(theirs) and mine == theirs)


@dataclass(frozen=True)
class ShownMedia:
    """The media of a batch of prompts.

    Attributes:
        tokens: float[B, T_img, n, d] vision tokens; None without media.
        mask: bool[B, T_img, n], false at padding, on the CPU; None for no padding.
        keys: for each row a key of each of its media, equal where two media are; None to compare vision tokens.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    keys: Sequence[Sequence[Hashable]] | None = None

    def of_row(self, row: int) -> list[Tensor]:
        """Return the vision tokens of each medium of a row: float[n, d] without padding."""
        if self.tokens is None:
            return []
        if self.mask is None:
            return list(self.tokens[row])
        pairs = zip(self.tokens[row], self.mask[row], strict=True)
        return [x if mask.all() else x[moved(mask.nonzero()[:, 0], x.device)] for x, mask in pairs if mask.any()]


@dataclass(frozen=True)
class Reuse:
    """What new prompts can take from a cache.

    Attributes:
        cached: positions at the start of every row that the cache holds.
        shared: positions at the start that all rows share, at least `cached`; one call reads the rest of these for all.
    """

    cached: int
    shared: int


class PromptCache:
    """Pass the same object to `VLM.generate(…, prompt_cache=…)` each time, always with whole prompts.

    `generate` takes from it as many positions as the prompt shares with the last one. After one row, it keeps the row
    and its answer for the next call; after several rows, it keeps what they share.

    Attributes:
        reused: positions of each row that the last call did not compute.
    """

    def __init__(self) -> None:
        self.reused = 0
        self._row: PromptRow | None = None
        self._cache: Any = None

    @property
    def length(self) -> int:
        """Positions that are kept."""
        return 0 if self._row is None else len(self._row)

    def match(self, rows: Sequence[PromptRow], *, whole_media: bool = False) -> Reuse:
        """Compare new rows with the row that is kept and with each other; change nothing.

        The last position of each row is never reused: it gives the logits of the first new token.

        Args:
            rows: of the new prompts.
            whole_media: whether the positions of a medium are only reused together, since they see each other.
        """
        most = min(map(len, rows)) - 1
        if whole_media:
            most = min(row.length_before_media(most) for row in rows)
        cached = 0 if self._row is None else min(most, *(row.shared_with(self._row) for row in rows))
        if whole_media:
            cached = rows[0].length_before_media(cached)
        if not self._can_crop(cached):
            cached = 0
        shared = min(most, *(rows[0].shared_with(row) for row in rows[1:])) if len(rows) > 1 else cached
        if whole_media:
            shared = rows[0].length_before_media(shared)
        return Reuse(cached, shared if shared - cached >= MIN_SHARED_POSITIONS else cached)

    def crop(self, length: int) -> None:
        """Keep the first `length` positions, a number that `match` returned; 0 forgets all."""
        if self._row is None or not length:
            self.forget()
            return
        if surplus := self._cache.get_seq_length() - length:
            self._cache.crop(-surplus)
        self._row = self._row.cut(length)

    def keep(self, row: PromptRow, cache: Any) -> None:
        """Keep a row and the language model's cache of it; forget all if positions of the cache cannot be taken off."""
        self.forget()
        if is_plain(cache):
            self._row, self._cache = row.cut(cache.get_seq_length()), cache

    def forget(self) -> None:
        """Keep nothing."""
        self._row = self._cache = None

    def take(self) -> Any:
        """Hand the cache over to a call that will change it, and forget it until `keep`; None if nothing is kept."""
        cache = self._cache
        self.forget()
        return cache

    def for_rows(self, num_rows: int) -> Any:
        """Return the cache for so many rows that start with what is kept; a copy if there are several."""
        if num_rows == 1:
            return self._cache
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(num_rows)
        return cache

    def _can_crop(self, length: int) -> bool:
        """Say whether the cache can be cropped: a sliding window that is full has dropped its first positions."""
        if self._cache is None or not length:
            return False
        return self._cache.get_seq_length() == length or all(
            type(layer) is DynamicLayer or layer.get_seq_length() < layer.sliding_window for layer in self._cache.layers
        )


def is_plain(cache: Any) -> bool:
    """Say whether every layer of a cache holds keys and values by position, from which the last can be taken off."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
