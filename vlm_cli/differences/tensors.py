"""Tensors that differ, part by part. They are read one by one; no model is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlm_cli.checkpoint.stored import StoredModel, StoredTensor, part_of
from vlm_cli.composition import PARTS
from vlm_cli.report.weights import relative_norm

__all__ = ["STATES", "PartComparison", "TensorComparison", "TensorState", "compare_tensors"]

TensorState = Literal["equal", "rounded", "changed", "other_shape", "only_a", "only_b", "unknown"]
STATES: tuple[TensorState, ...] = (
    *("equal", "rounded", "changed"),
    *("other_shape", "only_a", "only_b", "unknown"),
)


@dataclass(frozen=True)
class TensorComparison:
    """What became of one tensor.

    Attributes:
        name: of the tensor.
        state: "rounded" if one side is the other, rounded to a dtype of fewer bits; "unknown" if the pretrained weights
            that a delta directory leaves out are not at hand.
        a, b: shape and dtype on each side; None where it has none.
        change: sum of the squares of the differences; 0 unless the state is "changed".
        start: sum of the squares on side A.
    """

    name: str
    state: TensorState
    a: StoredTensor | None
    b: StoredTensor | None
    change: float = 0.0
    start: float = 0.0

    @property
    def part(self) -> str:
        return part_of(self.name)

    @property
    def moved(self) -> float | None:
        """The norm of the change against the norm on side A."""
        return relative_norm(self.change, self.start) if self.state == "changed" else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state,
            "a": _facts(self.a),
            "b": _facts(self.b),
            "change": math.sqrt(self.change) if self.state == "changed" else None,
            "relative_change": self.moved,
        }


def _facts(x: StoredTensor | None) -> dict[str, Any] | None:
    return None if x is None else {"shape": [*x.shape], "dtype": str(x.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class PartComparison:
    """The tensors of a part.

    Attributes:
        name: of the part.
        tensors: all of them.
    """

    name: str
    tensors: tuple[TensorComparison, ...]

    @property
    def counts(self) -> dict[TensorState, int]:
        found = Counter(x.state for x in self.tensors)
        return {state: found[state] for state in STATES}

    @property
    def moved(self) -> float | None:
        """The norm of the change against the norm on side A, over the tensors that both sides have."""
        both = [x for x in self.tensors if x.start]
        return relative_norm(sum(x.change for x in both), sum(x.start for x in both)) if both else None

    def to_dict(self) -> dict[str, Any]:
        counts = {str(state): n for state, n in self.counts.items()}
        return {"part": self.name, **counts, "relative_change": self.moved}


def compare_tensors(
    a: StoredModel, b: StoredModel, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[PartComparison]:
    """Compare the tensors of two models. A tensor beside which an adapter stands counts with it.

    Args:
        a, b: the models.
        progress: called with the number of tensors that are done, and of all.

    Raises:
        VLMError: if a tensor cannot be read.
    """
    names = dict.fromkeys([*a.tensors, *b.tensors])
    same = {
        part
        for part, place in a.backbones.items()
        if part in b.backbones and place.sha256 and place.sha256 == b.backbones[part].sha256
    }
    found: dict[str, list[TensorComparison]] = {part: [] for part in PARTS}
    part = ""
    for i, name in enumerate(sorted(names, key=lambda x: [*PARTS].index(part_of(x)) if part_of(x) in PARTS else -1)):
        if part_of(name) != part:
            part = part_of(name)
            a.release()
            b.release()
        found.setdefault(part, []).append(_compare(a, b, name, same))
        progress(i + 1, len(names))
    a.release()
    b.release()
    return [PartComparison(part, tuple(tensors)) for part, tensors in found.items() if tensors]


def _compare(a: StoredModel, b: StoredModel, name: str, same: set[str]) -> TensorComparison:
    left, right = a.tensors.get(name), b.tensors.get(name)
    part = part_of(name)
    if left is None or right is None:
        lacking = a if left is None else b
        if part in lacking.missing:
            # Records of one hash name the same tensors, but an adapter may stand beside one of them.
            if part in same and not (a.has_adapter(name) or b.has_adapter(name)):
                return TensorComparison(name, "equal", left, right)
            return TensorComparison(name, "unknown", left, right)
        return TensorComparison(name, "only_b" if left is None else "only_a", left, right)
    if left.shape != right.shape:
        return TensorComparison(name, "other_shape", left, right)
    is_plain = not (left.has_adapter or right.has_adapter)
    if is_plain and left.is_pretrained and right.is_pretrained and part in same:
        return TensorComparison(name, "equal", left, right)  # both records have the same hash, which was compared
    x, y = a.read(name), b.read(name)
    start = float(x.double().square().sum())
    if x.dtype == y.dtype:
        if _same_bits(x, y):
            return TensorComparison(name, "equal", left, right, 0.0, start)
    elif _same_bits(x.to(y.dtype), y) or _same_bits(x, y.to(x.dtype)):
        return TensorComparison(name, "rounded", left, right, 0.0, start)
    return TensorComparison(name, "changed", left, right, float((x.double() - y.double()).square().sum()), start)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Tell whether two tensors are equal; numbers that are no numbers equal each other."""
    return torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all())
