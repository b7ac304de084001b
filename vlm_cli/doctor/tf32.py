"""TF32 of NVIDIA's GPUs: products of float32 with 10 bits after the point instead of 23.

By default, torch uses it in convolutions, such as the one that makes patches of a picture, and not in matrix products.
With it, two ways to compute the same float32 logits differ by a thousandth, and nobody would see a fault of that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["uses_of_tf32", "without_tf32"]

_cudnn: Any = torch.backends.cudnn  # a module that is replaced by an object, whose attributes mypy does not see
_BACKENDS = {
    "matrix products": torch.backends.cuda.matmul,
    "convolutions": _cudnn.conv,
    "recurrent layers": _cudnn.rnn,
}


def uses_of_tf32() -> list[str]:
    """Return the operations that torch may compute in TF32 at the moment, such as "convolutions"."""
    return [name for name, backend in _BACKENDS.items() if backend.fp32_precision == "tf32"]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 in float32 inside the block; without effect on devices that have no TF32."""
    before = [backend.fp32_precision for backend in _BACKENDS.values()]
    _set(["ieee"] * len(before))
    try:
        yield
    finally:
        _set(before)


def _set(precisions: Sequence[str]) -> None:
    for backend, precision in zip(_BACKENDS.values(), precisions, strict=True):
        backend.fp32_precision = precision
