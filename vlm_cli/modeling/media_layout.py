"""`MediaLayout`: which views of a batch are encoded, and where each of them stands.

To compute it, a process must look at numbers, and would wait for an accelerator that holds them. So whoever has the
batch on the CPU makes it there: a data loader, or the model before it moves pixels to an accelerator. Of pixels that
are on an accelerator already, nothing is compared.
B rows, T_img media, F views of a medium.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_cli.modeling.deduplicate import find_equal, is_on_host

__all__ = ["MediaLayout", "find_media"]


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
        media: int[media, F], the distinct media, as numbers of their views; in their order if all are distinct.
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
            mask: bool[B, T_img, F], true for views that are not padding; None, or all false, for no padding. It may be
                on the CPU while the views are on an accelerator.

        Returns:
            The layout, on the device of the mask, or of the views without one. If that is an accelerator, every view
            of the batch is encoded, those of padding included.
        """
        shape = views.shape[:3]
        if not is_on_host(views if mask is None else mask):
            return cls._without_looking(views, mask)
        places = torch.arange(shape.numel()) if mask is None else mask.flatten().nonzero()[:, 0]
        if not len(places):
            places = torch.arange(shape.numel())
        is_whole = len(places) == shape.numel()
        if is_on_host(views):
            first, inverse = find_equal(views.flatten(0, 2) if is_whole else views.flatten(0, 2)[places])
        else:
            first = inverse = torch.arange(len(places))
        number = torch.full(shape, -1)
        number.view(-1)[places] = inverse
        if len(first) == shape.numel():  # all differ, and so do the media
            return cls(first, number, number.flatten(0, 1), torch.arange(shape[:2].numel()), has_padding=False)
        media, medium = find_media(number)
        return cls(places[first], number, media, medium, has_padding=not is_whole)

    @classmethod
    def _without_looking(cls, views: Tensor, mask: Tensor | None) -> MediaLayout:
        """Lay out views and a mask that an accelerator holds."""
        everything = torch.arange(views.shape[:3].numel(), device=views.device)
        number = everything.view(views.shape[:3])
        if mask is not None:
            number = torch.where(mask | ~mask.any(), number, -1)
        medium = torch.arange(views.shape[:2].numel(), device=views.device)
        return cls(everything, number, number.flatten(0, 1), medium, has_padding=mask is not None)

    def to(self, *args: Any, **kwargs: Any) -> MediaLayout:
        """Move the tensors, as `Tensor.to` does."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> MediaLayout:
        """Pin the tensors, as a data loader does."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> MediaLayout:
        views, number, media, medium = map(change, (self.views, self.number, self.media, self.medium))
        return MediaLayout(views, number, media, medium, self.has_padding)


def find_media(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Find the distinct media: int[B, T_img, X] numbers -> int[media, X] in order if all differ, int[B·T_img]."""
    flat = numbers.flatten(0, 1)
    media, medium = flat.unique(dim=0, return_inverse=True)
    return (media, medium) if len(media) < len(flat) else (flat, torch.arange(len(flat), device=flat.device))
