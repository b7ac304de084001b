"""Where a tensor of a checkpoint goes: a table from the checkpoint's names to those of `VLM.state_dict()`.

>>> targets_of = make_targets_of([(r"MP\\.proj\\.(\\w+)", r"vision_tokenizer.proj.\\1"), (r".*\\.inv_freq", None)])
>>> targets_of("MP.proj.weight")
[Target(target='vision_tokenizer.proj.weight', target_rows=None, source_rows=None)]
>>> targets_of("decoder.rotary.inv_freq"), targets_of("optimizer.step")
((), None)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Rule", "Target", "TargetsOf", "TargetsOfMatch", "identity", "make_targets_of", "stack_rows"]


def identity(x: Tensor) -> Tensor:
    """Return a tensor unchanged."""
    return x


@dataclass(frozen=True)
class Target:
    """A tensor of a VLM that a checkpoint's tensor fills, or the rows of it that are filled.

    Rows are indices on the first axis.

    Attributes:
        target: name in `VLM.state_dict()`.
        target_rows: rows that are filled; None for all.
        source_rows: rows of the checkpoint's tensor that are copied; None for all.
        transform: reshapes or scales the copied rows.
        restore: makes of the VLM's rows what `transform` made them of, for exports; None if nothing does.
    """

    target: str
    target_rows: slice | None = None
    source_rows: slice | None = None
    transform: Callable[[Tensor], Tensor] = field(default=identity, repr=False)
    restore: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def select(self, source: Tensor) -> Tensor:
        """Return what is copied of the checkpoint's tensor, transformed."""
        return self.transform(source if self.source_rows is None else source[self.source_rows])

    def region(self, parameter: Tensor) -> Tensor:
        """Return the rows of the VLM's tensor that are filled, as a view."""
        return parameter if self.target_rows is None else parameter[self.target_rows]

    @property
    def is_reversible(self) -> bool:
        """Whether the checkpoint's rows follow from the VLM's."""
        return self.restore is not None or self.transform is identity

    def give_back(self, parameter: Tensor) -> Tensor:
        """Return the checkpoint's rows, from the VLM's tensor that they fill."""
        rows = self.region(parameter)
        return rows if self.restore is None else self.restore(rows)

    def selected_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the shape of `select(source)` for a source of this shape; None if `select` would fail."""
        try:
            return tuple(self.select(torch.empty(shape, device="meta")).shape)
        except (RuntimeError, ValueError, IndexError):
            return None


#: Gives the targets of a tensor by its name: () if a VLM does not need the tensor, None if the name is unknown.
TargetsOf = Callable[[str], Sequence[Target] | None]

#: Gives the targets of a tensor by the match of its name.
TargetsOfMatch = Callable[[re.Match[str]], Sequence[Target]]

#: A pattern of whole names, and the targets of the tensors that match it: one name, in which `\1` is the first group;
#: a function of the match; or None for tensors that a VLM does not need.
Rule = tuple[str, str | TargetsOfMatch | None]


def make_targets_of(rules: Iterable[Rule]) -> TargetsOf:
    """Make one lookup of a table of rules; the first rule that matches a name decides."""
    compiled = [(re.compile(pattern), right) for pattern, right in rules]

    def targets_of(name: str) -> Sequence[Target] | None:
        for pattern, right in compiled:
            if match := pattern.fullmatch(name):
                if right is None:
                    return ()
                return [Target(match.expand(right))] if isinstance(right, str) else right(match)
        return None

    return targets_of


def stack_rows(target: str, order: str, which: str, num_rows: int) -> list[Target]:
    """Fill one matrix's rows of a target that stacks several, such as queries, keys and values.

    >>> stack_rows("attn.qkv.weight", "qkv", "k", 8)
    [Target(target='attn.qkv.weight', target_rows=slice(8, 16, None), source_rows=None)]

    Args:
        target: name in `VLM.state_dict()`.
        order: the letters of the stacked matrices, first to last.
        which: the letter of the matrix that is filled.
        num_rows: rows of each matrix.
    """
    start = order.index(which) * num_rows
    return [Target(target, target_rows=slice(start, start + num_rows))]
