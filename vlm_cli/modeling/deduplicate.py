"""Find equal tensors in a batch, so that a model computes each of them once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["deduplicate", "find_equal"]


def deduplicate(tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Keep one of each group of equal tensors, as `torch.unique` does with `return_inverse`.

    `unique[inverse]` is the input, bit for bit. With the frames A B A C:

        unique    A B C        inverse   0 1 0 2

    The order of `unique` is arbitrary. If all tensors differ, the input comes back as it is. `torch.unique(dim=0)`
    would sort whole frames; this function sorts a checksum for each and compares the frames to rule out a collision.

    Args:
        tensors: float[N, *].

    Returns:
        unique: float[M, *] with M <= N, and inverse: int[N].
    """
    first, inverse = find_equal(tensors)
    return (tensors if len(first) == len(tensors) else tensors[first]), inverse


def find_equal(tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Find one of each group of equal tensors: int[M] indices of what `deduplicate` keeps, and int[N] `inverse`."""
    numbers = torch.arange(len(tensors), device=tensors.device)
    if len(tensors) < 2:
        return numbers, numbers
    tensors = tensors.contiguous()
    # The bits as integers: their sums do not depend on the order of summation, so that equal tensors have equal sums on
    # every device.
    words = tensors.flatten(1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensors.element_size()])  # [N, W]
    weights = torch.arange(1, words.shape[1] + 1, device=tensors.device) * 0x9E3779B97F4A7C1
    sums = torch.stack([(x * weights).sum() for x in words])  # [N]
    values, inverse = sums.unique(return_inverse=True)
    first = numbers.new_full(values.shape, len(tensors)).scatter_reduce(0, inverse, numbers, "amin")  # [M]
    if len(first) < len(tensors) and torch.equal(words[first][inverse], words):
        return first, inverse
    return numbers, numbers
