"""`ReadRows`: rows whose prompts the language model has read, on their way into slots.

n rows, L positions of their prompts, v vision tokens of all media of a row, h heads, k head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ReadRows", "RowMedia", "as_index", "put_rows"]


@dataclass(frozen=True)
class RowMedia:
    """The media that new tokens of rows may see. All media of a row count as one.

    Attributes:
        values: float[n, …, v, k], as the fusion's `media_for_decoding` returns them.
        mask: bool[n, 1, v], true at those that the row sees.
    """

    values: Tensor
    mask: Tensor

    def widen(self, size: int) -> RowMedia:
        """Pad to so many vision tokens."""
        more = size - self.values.shape[-2]
        if more <= 0:
            return self
        return RowMedia(nn.functional.pad(self.values, (0, 0, 0, more)), nn.functional.pad(self.mask, (0, more)))

    def blank(self, rows: int) -> RowMedia:
        """Return media of the same shape that nobody sees, for other rows."""
        return RowMedia(*(x.new_zeros(rows, *x.shape[1:]) for x in (self.values, self.mask)))

    def put(self, where: Tensor, new: RowMedia, total: int) -> RowMedia:
        """Put rows of the same size at their places: int[n] of `total`."""
        return RowMedia(put_rows(self.values, where, new.values, total), put_rows(self.mask, where, new.mask, total))


@dataclass(frozen=True)
class ReadRows:
    """Rows whose prompts the language model has read.

    Attributes:
        cache: the language model's.
        mask: bool[n, L] on the CPU, false at padding, which may stand between positions.
        media_counts: int[n, 1], 1 for a row that shows media and 0 for others.
        media: None if new tokens see none.
    """

    cache: Any
    mask: Tensor
    media_counts: Tensor
    media: RowMedia | None

    @classmethod
    def of(cls, model: Any, output: Any) -> ReadRows:
        """Take what `VLM.generate` returned, with details, for prompts and one token.

        Args:
            model: the VLM.
            output: of `generate`.
        """
        media, mask = model.media_for_decoding(output.media, output.media_mask)
        return cls(
            cache=model.lm_interface.cache_in(output),
            mask=output.attention_mask.bool().cpu(),
            media_counts=output.media_counts.clamp(max=1)[:, None].to(model.device),
            media=None if media is None or mask is None else RowMedia(media, mask.flatten(1)[:, None]),
        )

    @cached_property
    def lengths(self) -> list[int]:
        """Positions of each row, without padding."""
        return [int(length) for length in self.mask.sum(1)]

    @cached_property
    def order(self) -> Tensor | None:
        """int[n, L], the order that puts padding first; None if it stands first already."""
        if torch.equal(self.mask.long(), self.mask.long().cummax(1).values):
            return None
        return self.mask.to(torch.uint8).argsort(dim=1, stable=True)

    @property
    def lacks_positions(self) -> bool:
        """Whether a window dropped columns, of padding inside of a row too, so that positions of rows are missing."""
        return self.order is not None and any(getattr(x, "is_sliding", False) for x in self.cache.layers)

    def trim(self, states: Tensor) -> Tensor:
        """Put padding first, and leave out what is padding in all rows: float[n, h, L, k] -> float[n, h, ≤ L, k]."""
        if self.order is not None:
            index = self.order.to(states.device, non_blocking=True)[:, None, :, None]
            states = states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
        return states[:, :, -max(self.lengths) :]

    def media_beside(self, old: RowMedia | None) -> tuple[RowMedia, RowMedia] | None:
        """Return the media of rows in slots and those of these rows, of one size; None if nobody shows any.

        Args:
            old: of the slots; the result has the same object if it is as large as it must be.
        """
        if (given := old or self.media) is None:
            return None
        old, new = old or given.blank(0), self.media or given.blank(len(self.mask))
        size = max(old.values.shape[-2], new.values.shape[-2])
        return old.widen(size), new.widen(size)


def put_rows(old: Tensor, where: Tensor, new: Tensor, total: int) -> Tensor:
    """Put rows at their places: *[S, …], int[n], *[n, …] -> *[total, …], 0 at places that are new and free."""
    if len(old) < total:
        old = torch.cat([old, new.new_zeros(total - len(old), *new.shape[1:])])
    return old.index_copy(0, where, new)


def as_index(slots: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers of slots as int[n] of a device, for which the host does not wait."""
    return torch.tensor(list(slots), dtype=torch.long).to(device, non_blocking=True)
