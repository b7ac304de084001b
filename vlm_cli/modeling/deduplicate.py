"""Find equal tensors in a batch, so that a model computes each of them once."""

from __future__ import annotations

from collections import defaultdict
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["deduplicate", "find_equal", "is_on_host", "moved", "on_host"]

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

SAMPLED_WORDS = 256  # words of a tensor that are looked at before tensors are compared as a whole
MOST_LOOKALIKES = 8  # distinct tensors with the same sample; further ones count as distinct without a comparison


def is_on_host(tensor: Tensor) -> bool:
    """Tell whether this process can look at the numbers of a tensor without waiting for an accelerator."""
    return tensor.device.type == "cpu"


def on_host(tensor: MaybeTensor) -> MaybeTensor:
    """Return a tensor in the memory of the CPU, or None for None; an accelerator that holds it has to be waited for."""
    return tensor if tensor is None or tensor.is_meta or is_on_host(tensor) else tensor.cpu()


def moved(tensor: MaybeTensor, device: torch.device) -> MaybeTensor:
    """Return a tensor on a device, without waiting for the device; None for None."""
    return tensor if tensor is None or tensor.device == device else tensor.to(device, non_blocking=True)


def deduplicate(tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Keep one of each group of equal tensors, as `torch.unique` does with `return_inverse`.

    `unique[inverse]` is the input, bit for bit. With the frames A B A C:

        unique    A B C        inverse   0 1 0 2

    If all tensors differ, or if an accelerator holds them, the input comes back as it is.

    Args:
        tensors: float[N, *].

    Returns:
        unique: float[M, *] with M <= N, in the order of the input, and inverse: int[N].
    """
    first, inverse = find_equal(tensors)
    return (tensors if len(first) == len(tensors) else tensors[first]), inverse


def find_equal(tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Find one of each group of equal tensors: int[M] indices of what `deduplicate` keeps, and int[N] `inverse`.

    A few words of each are looked at, and only tensors that agree there are compared as a whole. On an accelerator, a
    comparison would make the process wait, and cost more than it saves: all tensors then count as distinct.
    """
    numbers = torch.arange(len(tensors), device=tensors.device)
    if len(tensors) < 2 or not is_on_host(tensors):
        return numbers, numbers
    # The bits as integers, so that equal bits are equal, also those of NaN.
    words = tensors.detach().contiguous().flatten(1)
    words = words.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[words.element_size()])  # [N, W]
    samples = words[:, :: max(1, words.shape[1] // SAMPLED_WORDS)].contiguous().numpy()
    kept: list[int] = []
    inverse: list[int] = []
    lookalikes: defaultdict[bytes, list[int]] = defaultdict(list)  # sample -> places in `kept`
    for number, sample in enumerate(samples):
        known = lookalikes[sample.tobytes()]
        equal = next((i for i in known[:MOST_LOOKALIKES] if torch.equal(words[kept[i]], words[number])), None)
        if equal is None:
            equal = len(kept)
            known.append(equal)
            kept.append(number)
        inverse.append(equal)
    return torch.tensor(kept), torch.tensor(inverse)
