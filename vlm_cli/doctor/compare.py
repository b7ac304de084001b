"""Differences between tensors, as plain numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlm_cli.doctor.finding import Measured

__all__ = ["compare", "is_same", "largest_difference", "scale_of"]


def compare(found: Tensor, expected: Tensor, changed: Tensor) -> Measured:
    """Compare two ways to compute `expected`, and what it becomes after a change."""
    return Measured(largest_difference(found, expected), scale_of(expected), twin=largest_difference(changed, expected))


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; infinity if either tensor holds NaN."""
    apart = torch.where(a == b, torch.zeros_like(a), a - b).abs().float()
    return float(apart.nan_to_num(nan=math.inf).max()) if apart.numel() else 0.0


def scale_of(logits: Tensor) -> float:
    """Return the largest absolute number that is finite."""
    finite = logits[logits.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def is_same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers; NaN equals NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
