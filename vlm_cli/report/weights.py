"""Norms, dtypes, dead and exploding rows of a model's tensors, and how far they moved, by part and layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

__all__ = ["EXPLODING", "GroupWeights", "TensorWeights", "WeightReport", "layer_of", "measure_tensor"]

EXPLODING = 10.0  # times the median norm of a tensor's rows
_SHOWN_ROWS = 20  # of the numbers of rows that a report lists for one tensor


@dataclass(frozen=True, kw_only=True)
class TensorWeights:
    """One tensor.

    Attributes:
        name, shape, dtype: of the tensor.
        squares: sum of the squares of its finite numbers.
        rows: along its first axis; 0 for a vector, such as a bias.
        dead: which rows hold nothing but zeros.
        exploding: which rows are not finite, or have a norm above a multiple of the median. A vector that is not finite
            has one such row.
        change: sum of the squares of what training changed; None if the beginning is not known.
        start: sum of the squares before that.
        has_adapter: whether an adapter is added to the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    squares: float
    rows: int
    dead: tuple[int, ...]
    exploding: tuple[int, ...]
    change: float | None = None
    start: float = 0.0
    has_adapter: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "shape": [*self.shape],
            "dtype": self.dtype,
            "norm": math.sqrt(self.squares),
            "rows": self.rows,
            "dead_rows": len(self.dead),
            "dead": [*self.dead[:_SHOWN_ROWS]],
            "exploding_rows": len(self.exploding),
            "exploding": [*self.exploding[:_SHOWN_ROWS]],
            "moved": relative_norm(self.change, self.start),
            "adapter": self.has_adapter,
        }


def measure_tensor(
    name: str, x: Tensor, *, times: float = EXPLODING, start: Tensor | None = None, has_adapter: bool = False
) -> TensorWeights:
    """Measure a tensor.

    Args:
        name: of the tensor.
        x: float[...] or integers.
        times: a row explodes above this multiple of the median norm of the rows that are neither dead nor infinite.
        start: the tensor before it was trained; None if it is not known. One of another shape counts as unknown.
        has_adapter: whether an adapter was added to it.
    """
    numbers = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    is_table = numbers.ndim > 1 and numbers.numel() > 0
    table = numbers.reshape(numbers.shape[0] if is_table else 1, -1)
    is_finite = table.isfinite().all(dim=1)
    finite = torch.where(table.isfinite(), table, 0.0)
    norms = finite.double().square().sum(dim=1).sqrt()  # [rows]
    dead = is_finite & (norms == 0) if is_table else torch.zeros_like(is_finite)
    alive = norms[is_finite & (norms > 0)]
    is_exploding = ~is_finite
    if is_table and alive.numel():
        is_exploding |= norms > times * alive.median()
    change, before = None, 0.0
    if start is not None and start.shape == x.shape:
        began = start.detach().to(numbers)
        change = float((numbers - began).double().square().sum())
        before = float(began.double().square().sum())
    return TensorWeights(
        name=name,
        shape=tuple(x.shape),
        dtype=str(x.dtype).removeprefix("torch."),
        squares=float(norms.square().sum()),
        rows=table.shape[0] if is_table else 0,
        dead=tuple(dead.nonzero().flatten().tolist()),
        exploding=tuple(is_exploding.nonzero().flatten().tolist()),
        change=change,
        start=before,
        has_adapter=has_adapter,
    )


def relative_norm(change: float | None, start: float) -> float | None:
    """Return the norm of a change against the norm before it; None if it is not known, or all was zero.

    Args:
        change, start: sums of squares.
    """
    if change is None:
        return None
    if start == 0:
        return 0.0 if change == 0 else None
    return math.sqrt(change / start)


@dataclass(frozen=True)
class GroupWeights:
    """The tensors of a layer or part together.

    Attributes:
        name: of the layer or part.
        tensors: its tensors.
        groups: its layers, if it is a part.
        start: what a part began with, and why it is not known.
    """

    name: str
    tensors: tuple[TensorWeights, ...]
    groups: tuple[GroupWeights, ...] = ()
    start: Mapping[str, Any] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        return math.sqrt(sum(x.squares for x in self.tensors))

    @property
    def parameters(self) -> int:
        return sum(math.prod(x.shape) for x in self.tensors)

    @property
    def rms(self) -> float:
        """The root of the mean square of the numbers."""
        return self.norm / math.sqrt(self.parameters) if self.parameters else 0.0

    @property
    def dtype(self) -> str:
        return "+".join(dict.fromkeys(x.dtype for x in self.tensors))

    @property
    def rows(self) -> int:
        return sum(x.rows for x in self.tensors)

    @property
    def dead(self) -> int:
        return sum(len(x.dead) for x in self.tensors)

    @property
    def exploding(self) -> int:
        return sum(len(x.exploding) for x in self.tensors)

    @property
    def moved(self) -> float | None:
        """The norm of the change against the norm before it, over the tensors whose beginning is known."""
        known = [x for x in self.tensors if x.change is not None]
        if not known:
            return None
        return relative_norm(sum(x.change or 0.0 for x in known), sum(x.start for x in known))

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "name": self.name,
            "tensors": len(self.tensors),
            "parameters": self.parameters,
            "norm": self.norm,
            "rms": self.rms,
            "dtype": self.dtype,
            "rows": self.rows,
            "dead_rows": self.dead,
            "exploding_rows": self.exploding,
            "moved": self.moved,
        }
        if self.groups:
            return {**data, "start": dict(self.start), "layers": [x.to_dict() for x in self.groups]}
        return {**data, "each": [x.to_dict() for x in self.tensors]}


@dataclass(frozen=True)
class WeightReport:
    """The weights of a model.

    Attributes:
        parts: in the order of the data flow.
        times: a row explodes above this multiple of the median norm.
        missing: part -> why tensors that a delta directory leaves out could not be read.
    """

    parts: tuple[GroupWeights, ...]
    times: float
    missing: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "exploding_above": self.times,
            "missing": dict(self.missing),
            "parts": [part.to_dict() for part in self.parts],
        }

    @classmethod
    def collect(
        cls,
        measured: Iterable[TensorWeights],
        part_of: Callable[[str], str],
        starts: Mapping[str, Mapping[str, Any]],
        *,
        times: float,
        missing: Mapping[str, str],
    ) -> WeightReport:
        """Put tensors together.

        Args:
            measured: the tensors, sorted by part.
            part_of: returns the part of a tensor's name.
            starts: part -> what it began with.
            times, missing: of the report.
        """
        parts = []
        for part, members in groupby(measured, lambda x: part_of(x.name)):
            tensors = tuple(members)
            layers: dict[str, list[TensorWeights]] = {}
            for x in tensors:
                layers.setdefault(layer_of(x.name), []).append(x)
            groups = tuple(GroupWeights(layer, tuple(layers[layer])) for layer in sorted(layers, key=_numbers_last))
            parts.append(GroupWeights(part, tensors, groups, starts.get(part, {})))
        return cls(tuple(parts), times, missing)


def layer_of(name: str) -> str:
    """Return the layer of a tensor's name: up to its first number, or its module. The part is left out.

    >>> layer_of("lang_model.model.layers.0.mlp.up_proj.weight"), layer_of("added_tokens.head.weight")
    ('model.layers.0', 'head')
    >>> layer_of("vision_encoder.visual.encoders.1.blocks.3.norm.bias"), layer_of("vision_tokenizer.latents")
    ('encoders.1.blocks.3', 'latents')
    """
    words = name.split(".")[1:]
    if words[:1] == ["visual"]:
        words = words[1:]
    start = 2 if words[:1] == ["encoders"] else 0
    for i, word in enumerate(words[start:], start):
        if word.isdecimal():
            return ".".join(words[: i + 1])
    return ".".join(words[:-1] if len(words) > 1 and words[-1] in ("weight", "bias") else words)


def _numbers_last(layer: str) -> tuple[Any, ...]:
    """Sort layers by their numbers, those without a number first."""
    words = layer.split(".")
    numbers = [int(word) for word in words if word.isdecimal()]
    return (bool(numbers), [word for word in words if not word.isdecimal()], numbers)
