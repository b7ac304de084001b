"""Copy a checkpoint's tensors into a model: plan by names and shapes, account for every tensor, then copy.

plan = plan_fill(model, checkpoint, targets_of, has_weights=...)   # reads no tensor
if plan.report.is_complete:
    plan.copy(checkpoint)                                          # reads file by file
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint, TensorInfo
from vlm_cli.checkpoint.published.targets import Target, TargetsOf
from vlm_cli.checkpoint.surplus import is_computed
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.vlm import VLM

__all__ = ["FillPlan", "KeyReport", "plan_fill"]


_PARTS = tuple(VLM.PART_PREFIXES.values())


@dataclass
class KeyReport:
    """What becomes of each tensor of a checkpoint and of the model.

    Attributes:
        loaded: names of the model that the checkpoint fills; tied tensors are listed under each of their names.
        absent: names of the model that the checkpoint may lack, and does: a pretrained part fills them, or the model
            does not need them.
        missing: names of the model that the checkpoint must fill, and does not.
        unused: names of the checkpoint that the model does not have.
        surplus: those of `unused` that belong to a part of the model: the weights are of a larger model, for instance
            with more layers. Names that the layout does not know are not counted.
        mismatched: name of the checkpoint -> its shape, and the different shape that the model needs.
        replaced: names of the checkpoint whose part another one replaces.
        new: names of the model that the checkpoint does not fill because their part replaces another, or depends on it.
    """

    loaded: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether the checkpoint fills something, everything that it must fill, and has a place for all of it."""
        return bool(self.loaded) and not self.missing and not self.mismatched and not self.surplus

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; without a replaced part, nothing is said of replaced ones."""
        swaps = ("replaced", "new") if not self.replaced and not self.new else ()
        return {key: x for key, x in vars(self).items() if key not in swaps}


@dataclass(frozen=True)
class FillPlan:
    """Which tensor of a checkpoint goes where in a model.

    Attributes:
        model: the model that is filled.
        report: what becomes of each tensor.
        targets: name of the checkpoint -> what it fills.
        unfit: names of the model, or names in its parts, that tensors of the checkpoint do not fit.
    """

    model: VLM = field(repr=False)
    report: KeyReport = field(default_factory=KeyReport)
    targets: dict[str, list[Target]] = field(default_factory=dict)
    unfit: list[str] = field(default_factory=list)

    @torch.no_grad()
    def copy(self, checkpoint: PublishedCheckpoint) -> None:
        """Read the checkpoint file by file, and copy each tensor to its targets.

        A parameter on the meta device gets memory when its first tensor arrives. Rows of added tokens that the
        checkpoint does not fill become NaN, so that the caller can tell them apart and initialize them. Other meta
        parameters that stay unfilled become zero; the model does not need them.

        Raises:
            CheckpointError: if a file is damaged.
        """
        parameters = _Parameters(self.model)
        for name in self.report.absent:
            if name.startswith("added_tokens."):
                parameters.materialize(name).fill_(torch.nan)
        unfilled = [name for name in self.report.absent if parameters[name].is_meta]
        for name, tensor in checkpoint.read():
            for target in self.targets.get(name, ()):
                target.region(parameters.materialize(target.target)).copy_(target.select(tensor))
        # A table without rows, of a model that adds no token, needs no tensor.
        empty = [name for name in self.report.loaded if not parameters[name].numel()]
        for name in (*unfilled, *empty):
            if parameters[name].is_meta:
                parameters.materialize(name).zero_()


def plan_fill(
    model: VLM,
    checkpoint: PublishedCheckpoint,
    targets_of: TargetsOf,
    *,
    has_weights: Callable[[str], bool],
    is_optional: Callable[[str], bool] = lambda name: False,
    new: tuple[str, ...] = (),
) -> FillPlan:
    """Decide what each tensor of a checkpoint fills, and compare all shapes, without reading a tensor.

    Args:
        model: its parameters may be on the meta device.
        checkpoint: names, shapes and dtypes of the tensors.
        targets_of: where each of them goes.
        has_weights: whether a parameter of this name has its weights already, from a pretrained part.
        is_optional: whether the model can do without a parameter of this name.
        new: beginnings of the names of parameters that the checkpoint does not fill, since their part is new.

    Raises:
        CheckpointError: if the checkpoint's weights are quantized.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    plan = FillPlan(model)
    report = plan.report
    # Tied parameters are one object with two names, so parameters are counted by identity.
    num_filled: Counter[int] = Counter()
    mismatched: set[int] = set()
    for name, info in checkpoint.tensors.items():
        targets = targets_of(name)
        if targets is None:
            report.unused.append(name)
            continue
        if targets and not (targets := [x for x in targets if not x.target.startswith(new)]):
            report.replaced.append(name)
        for target in targets:
            parameter = state.get(target.target)
            if parameter is None:
                report.unused.append(name)
                if target.target.startswith(_PARTS) and not is_computed(name):
                    report.surplus.append(name)
                    plan.unfit.append(target.target)
                break
            _check_dtype(checkpoint, name, info, parameter)
            wanted = tuple(target.region(torch.empty_like(parameter, device="meta")).shape)
            given = target.selected_shape(info.shape)
            if given != wanted:
                report.mismatched[name] = (list(given or info.shape), list(wanted))
                plan.unfit.append(target.target)
                mismatched |= {id(state[x.target]) for x in targets if x.target in state}
                break
            num_filled[id(parameter)] += torch.Size(wanted).numel()
            plan.targets.setdefault(name, []).append(target)
    report.new += [name for name in state if name.startswith(new)]
    kept = {name: x for name, x in state.items() if not name.startswith(new)}
    _account(report, kept, num_filled, mismatched, has_weights, is_optional)
    return plan


def _account(
    report: KeyReport,
    state: Mapping[str, Tensor],
    num_filled: Counter[int],
    mismatched: Container[int],
    has_weights: Callable[[str], bool],
    is_optional: Callable[[str], bool],
) -> None:
    """Report what becomes of each tensor of the model.

    Args:
        report: gets the names.
        state: name -> tensor of the model.
        num_filled: identity of a tensor -> how many of its numbers the checkpoint fills.
        mismatched: identities of the targets of tensors with another shape, which are reported already.
        has_weights: as of `plan_fill`.
        is_optional: as of `plan_fill`.
    """
    for name, parameter in state.items():
        filled = num_filled[id(parameter)]
        if filled >= parameter.numel() or (filled and has_weights(name)):
            report.loaded.append(name)
        elif id(parameter) in mismatched:
            continue
        elif has_weights(name) or is_optional(name):
            report.absent.append(name)
        else:
            report.missing.append(name)


def _check_dtype(checkpoint: PublishedCheckpoint, name: str, info: TensorInfo, parameter: Tensor) -> None:
    """Refuse integers for a parameter of floating-point numbers.

    Raises:
        CheckpointError: names the tensor.
    """
    if parameter.is_floating_point() and not info.dtype.is_floating_point:
        raise CheckpointError(
            f"{name!r} of {checkpoint.name!r} holds integers ({info.dtype}): its weights are quantized, and vlm does "
            "not read the scales. Give weights that are not quantized."
        )


class _Parameters:
    """A model's tensors by name, which get memory on request."""

    def __init__(self, model: VLM) -> None:
        self._state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append((module, leaf))

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    def materialize(self, name: str) -> Tensor:
        """Return a parameter with memory: a meta parameter is replaced, in all modules that share it."""
        old = self._state[name]
        if not old.is_meta:
            return old
        new = nn.Parameter(torch.empty_like(old, device="cpu"), requires_grad=old.requires_grad)
        for module, leaf in self._owners[id(old)]:
            setattr(module, leaf, new)
        self._state |= {other: new for other, x in self._state.items() if x is old}
        return new
