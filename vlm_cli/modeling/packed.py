"""Packed rows: short rows that stand one after the other in one row, and do not see each other.

`segments` numbers the rows of a packed row from 1, and is 0 at padding. Two rows `a I b` and `c d` become

    lang_x       p a I b c d
    segments     0 1 1 1 2 2
    positions    0 0 1 2 0 1        each row begins at position 0

The language model gets a mask in which a position sees its own row alone (`fusion/masks.py`), and cross-attention shows
it the media of its own row alone. So a packed row has the losses and gradients of its rows.
B rows, T positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

__all__ = ["count_within", "last_of_segment", "positions_within", "start_of_segment"]


def start_of_segment(segments: Tensor) -> Tensor:
    """Return where the segment of each position begins: int[B, T] -> int[B, T]."""
    begins = nnf.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    return torch.where(begins, _numbers(segments), 0).cummax(-1).values


def last_of_segment(segments: Tensor) -> Tensor:
    """Return the last position of the segment of each position: int[B, T] -> int[B, T]."""
    length = segments.shape[1]
    return length - 1 - start_of_segment(segments.flip(-1)).flip(-1)


def positions_within(segments: Tensor) -> Tensor:
    """Number the positions of each segment from 0: int[B, T] -> int[B, T]."""
    return _numbers(segments) - start_of_segment(segments)


def count_within(flags: Tensor, segments: Tensor) -> Tensor:
    """Count flags at or before each position, in its segment alone: bool[B, T], int[B, T] -> int[B, T]."""
    counts = flags.cumsum(-1)
    return counts - (counts - flags.long()).gather(1, start_of_segment(segments))


def _numbers(segments: Tensor) -> Tensor:
    return torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
