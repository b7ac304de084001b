"""`MediaLayout`: which views of a batch are encoded, and where each of them stands.

To compute it, a process must look at numbers, and would wait for an accelerator that holds them. So a data loader makes
it from a batch that is still on the CPU; without one, the model makes it from the tensors that it gets.
B rows, T_img media, F views of a medium.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_cli.modeling.deduplicate import find_equal

__all__ = ["MediaLayout"]


@dataclass(frozen=True)
class MediaLayout:
    """Equal views are encoded once, and padding never. Two rows of two clips of two frames A, B, C, padding as `·`:

        views                AB  A·          AB  C·
        distinct views       A B C           the encoder reads 3 images instead of 8
        number               01  0-          01  2-      (- is -1: padding)
        media                01  0-  2-      a tokenizer that reads each medium by itself reads 3 instead of 4
        medium               0 1             0 2

    Attributes:
        views: int[views], the distinct views among the B·T_img·F of the batch.
        number: int[B, T_img, F], of each view among the distinct ones; -1 is padding.
        media: int[media, F], the distinct media, as numbers of their views.
        medium: int[B·T_img], of each medium among the distinct ones.
        has_padding: whether a medium has a view that is padding.
    """

    views: Tensor
    number: Tensor
    media: Tensor
    medium: Tensor
    has_padding: bool

    @classmethod
    def of(cls, views: Tensor, mask: Tensor | None) -> MediaLayout:
        """Compare the views of a batch.

        Args:
            views: *[B, T_img, F, …], pixels or features.
            mask: bool[B, T_img, F], true for views that are not padding; None, or all false, for no padding.
        """
        shape = views.shape[:3]
        valid = torch.ones(shape, dtype=torch.bool, device=views.device) if mask is None or not mask.any() else mask
        places = valid.flatten().nonzero()[:, 0]
        first, inverse = find_equal(views.flatten(0, 2)[places])
        number = torch.full(shape, -1, device=views.device)
        number.view(-1)[places] = inverse
        media, medium = number.flatten(0, 1).unique(dim=0, return_inverse=True)
        return cls(places[first], number, media, medium, has_padding=len(places) < valid.numel())

    def to(self, *args: Any, **kwargs: Any) -> MediaLayout:
        """Move the tensors, as `Tensor.to` does."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> MediaLayout:
        """Pin the tensors, as a data loader does."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> MediaLayout:
        views, number, media, medium = map(change, (self.views, self.number, self.media, self.medium))
        return MediaLayout(views, number, media, medium, self.has_padding)
