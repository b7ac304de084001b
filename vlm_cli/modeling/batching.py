"""Rows of different lengths as one tensor and its mask: tokens padded at the left, media padded at the end.

B rows, T_txt tokens, T_img media, F views of a medium, n views or vision tokens of a medium, C H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_cli.tiling import MediumSize

__all__ = ["MediumPixels", "pad_left", "stack_grids", "stack_media", "stack_pixels"]


def pad_left(rows: Sequence[Sequence[int] | Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Pad rows at the left to one length.

    >>> ids, mask = pad_left([[5, 6, 7], [8]], pad=0)
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])

    Args:
        rows: int[T] of each row; tensors stay on their device.
        pad: token for the positions before a row.

    Returns:
        int[B, T_txt] tokens and int[B, T_txt] mask, 0 at padding.
    """
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    device = tensors[0].device if tensors else None
    length = max(map(len, tensors), default=0)
    ids = torch.full((len(tensors), length), pad, device=device)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(tensors):
        ids[b, length - len(row) :], mask[b, length - len(row) :] = row, 1
    return ids, mask


def stack_media(
    rows: Sequence[Sequence[Tensor]],
    masks: Sequence[Sequence[Tensor]] | None = None,
    *,
    shape: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Stack the media of rows; padding comes last in each row and in each medium, zero and with a false mask.

    A row of two clips, of 1 and 3 frames, and a row of one clip of 2 frames become [2, 2, 3, …] with the mask

        1··  111
        11·  ···

    Args:
        rows: for each row its media, *[n, …]; n differs, the other dimensions do not.
        masks: bool[n] of each medium; None for all true.
        shape: dimensions after n, where no row has a medium.

    Returns:
        *[B, T_img, n, …] and bool[B, T_img, n], the latter on the device of `masks`.
    """
    media = [medium for row in rows for medium in row]
    size = (len(rows), max(map(len, rows), default=0), max(map(len, media), default=0))
    like = media[0] if media else torch.empty(0, *shape)
    stacked = like.new_zeros(*size, *like.shape[1:])
    known = like if masks is None else next((mask for row in masks for mask in row), like)
    mask = torch.zeros(size, dtype=torch.bool, device=known.device)
    for b, row in enumerate(rows):
        for t, medium in enumerate(row):
            stacked[b, t, : len(medium)] = medium
            mask[b, t, : len(medium)] = True if masks is None else masks[b][t]
    return stacked, mask


@dataclass(frozen=True)
class MediumPixels:
    """A preprocessed picture or clip.

    Attributes:
        views: float[F, C, H, W], the frames of a clip or the tiles of a picture.
        size: of the medium; it tells how the tiles lie in the picture.
    """

    views: Tensor
    size: MediumSize

    @property
    def digest(self) -> bytes:
        """What equal media share: a hash of the pixels and of the size, since equal tiles may have other bars."""
        content = hashlib.sha256(self.views.numpy().data)
        content.update(repr(self.size).encode())
        return content.digest()


def stack_pixels(rows: Sequence[Sequence[MediumPixels]], name: str = "pixel_values") -> dict[str, Tensor]:
    """Stack the media of rows as `VLM.forward` takes them.

    Args:
        rows: for each row its media; their views may be features, float[F, v, d].
        name: by which `VLM.forward` takes the views.

    Returns:
        The views, float[B, T_img, F, C, H, W], `vision_mask` bool[B, T_img, F], and if a picture has tiles
        `vision_grid` int[B, T_img, 4].
    """
    pixels, mask = stack_media([[medium.views for medium in row] for row in rows])
    return {name: pixels, "vision_mask": mask, **stack_grids([[x.size for x in row] for row in rows])}


def stack_grids(rows: Sequence[Sequence[MediumSize]]) -> dict[str, Tensor]:
    """Return `vision_grid`, int[B, T_img, 4] with zeros at padding, of media of these sizes; {} if none has tiles."""
    if not any(size.rows for row in rows for size in row):
        return {}
    grids, _ = stack_media([[torch.tensor([size.grid]) for size in row] for row in rows])
    return {"vision_grid": grids[:, :, 0]}
