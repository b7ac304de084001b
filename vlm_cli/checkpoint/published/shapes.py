"""What names and shapes tell: numbers of layers, intervals between them, shapes of tensors under several names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.errors import CheckpointError

__all__ = ["count_layers", "find_layers", "find_shape", "interval_of"]


def find_layers(checkpoint: PublishedCheckpoint, pattern: str) -> list[int]:
    """Return the different layer numbers in the names that begin with a pattern, in order.

    Args:
        checkpoint: its names are searched.
        pattern: its first group that takes part in a match is the number.
    """
    matches = (re.match(pattern, name) for name in checkpoint.tensors)
    return sorted({int(next(x for x in match.groups() if x is not None)) for match in matches if match})


def count_layers(checkpoint: PublishedCheckpoint, pattern: str) -> int:
    """Count the different layer numbers in the names that begin with a pattern.

    Raises:
        CheckpointError: if they are not 0, 1, 2, ….
    """
    layers = find_layers(checkpoint, pattern)
    if missing := sorted(set(range(max(layers, default=-1) + 1)) - set(layers)):
        raise CheckpointError(f"{checkpoint.name!r} lacks layer {missing[0]} of the layers that match {pattern}.")
    return len(layers)


def interval_of(layers: Sequence[int], *, single: int) -> int | None:
    """Return the distance from each of these layers to the next; None if the distances differ.

    >>> interval_of([3, 7, 11], single=4)
    4
    >>> interval_of([3], single=4)
    4

    Args:
        layers: numbers in ascending order.
        single: the answer for a single layer.
    """
    distances = {after - before for before, after in pairwise(layers)} or {single}
    return distances.pop() if len(distances) == 1 else None


def find_shape(checkpoint: PublishedCheckpoint, pattern: str) -> tuple[int, ...] | None:
    """Return the shape of the first tensor whose whole name matches a pattern; None if no name does."""
    found = (info.shape for name, info in checkpoint.tensors.items() if re.fullmatch(pattern, name))
    return next(found, None)
