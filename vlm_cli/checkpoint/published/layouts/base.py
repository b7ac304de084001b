"""What a layout of published weights says, and how its tensors find their places.

A layout is one small module: how it is recognised, which composition it is, and where each of its tensors goes. It is
recognised by names and shapes, never by the name of a repository.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.weights import KeyReport
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.vlm import VLM

__all__ = [
    "CheckpointDescription",
    "Layout",
    "Target",
    "TargetsOf",
    "fill",
    "identity",
    "mean_rows",
    "number_of",
    "renamer",
]


def identity(x: Tensor) -> Tensor:
    """A tensor as it is."""
    return x


@dataclass(frozen=True)
class Target:
    """Where a tensor of a checkpoint goes, or a part of it.

    Attributes:
        target: name in `VLM.state_dict()`.
        target_rows: part of the target's first axis that it fills; None for all.
        source_rows: part of the tensor's first axis that is taken; None for all.
        transform: how the taken part is reshaped or scaled.
    """

    target: str
    target_rows: slice | None = None
    source_rows: slice | None = None
    transform: Callable[[Tensor], Tensor] = identity


#: TargetsOf of a tensor by its name. Empty: it is known and not needed. None: it is not known.
TargetsOf = Callable[[str], Sequence[Target] | None]


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription:
    """A checkpoint in our terms.

    Attributes:
        composition: plain data for `Composition.compose`; flags of the user are laid over it.
        places: where its tensors go in a model of this configuration.
        text_config: configuration of a language model whose weights the checkpoint holds, as plain data with a
            `model_type`; None if it comes from `composition["language_model"]`.
        holds_language_model: whether the checkpoint holds all weights of `composition["language_model"]`, of which then
            only the configuration and the tokenizer are read.
        vision_config: OpenCLIP configuration (`embed_dim`, `vision_cfg`, `quick_gelu`, `preprocess`) of a tower whose
            weights the checkpoint holds; None if they come from `composition["vision_encoder"]`.
        tokenizer: directory or hub id of the tokenizer; None for that of the checkpoint, or of the language model.
        first_added_id: id of the first token that has rows of ours; None for the one after the tokenizer's last.
        initialize_like: added token -> a text; the token's embedding starts as that of the text's first token (the
            checkpoint never had the token itself).
        optional_pattern: pattern of names of ours that the layout never has and a VLM does not use.
        notes: what the user should know.
    """

    composition: Mapping[str, Any]
    places: Callable[[VLMConfig], TargetsOf]
    text_config: Mapping[str, Any] | None = None
    holds_language_model: bool = False
    vision_config: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    first_added_id: int | None = None
    initialize_like: Mapping[str, str] = field(default_factory=dict)
    optional_pattern: str = r"(?!)"
    notes: tuple[str, ...] = field(default=())


class Layout(Protocol):
    """One way in which published weights are written.

    Attributes:
        name: of the layout, as it is reported.
        source: where the layout is defined.
    """

    name: str
    source: str

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Whether names and shapes are those of this layout."""

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """The checkpoint in our terms.

        Raises:
            CheckpointError: if it is of this layout, and a number in it cannot be used.
        """


def renamer(table: Iterable[tuple[str, Any]]) -> TargetsOf:
    """TargetsOf from a table of patterns, tried in order against the whole name.

    The right side is a target, in which `\\1` stands for a group; a function of the match that returns places; or None
    for a tensor that is not needed.
    """
    rules = [(re.compile(pattern), right) for pattern, right in table]

    def places(name: str) -> Sequence[Target] | None:
        for pattern, right in rules:
            if match := pattern.fullmatch(name):
                if right is None:
                    return ()
                return [Target(match.expand(right))] if isinstance(right, str) else right(match)
        return None

    return places


def fill(
    model: VLM, checkpoint: PublishedCheckpoint, described: CheckpointDescription, *, has_weights: Callable[[str], bool]
) -> KeyReport:
    """Put a checkpoint's tensors into a model; shapes are compared before the first is read.

    Args:
        model: whose parameters may be on the meta device; those get memory when their first tensor comes.
        checkpoint: the tensors.
        described: where they go.
        has_weights: whether a name of ours has its weights already, from a pretrained part.

    Raises:
        CheckpointError: if a file is damaged, or its weights are quantized.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    report = KeyReport()
    places_of = described.places(model.config)
    plan: dict[str, list[Target]] = {}
    covered: dict[int, int] = {}
    for name, info in checkpoint.tensors.items():
        places = places_of(name)
        if places is None:
            report.unused.append(name)
            continue
        for place in places:
            target = state.get(place.target)
            if target is None:
                report.unused.append(name)
                break
            if target.is_floating_point() and not info.dtype.is_floating_point:
                raise CheckpointError(
                    f"{name!r} of {checkpoint.name!r} holds whole numbers ({info.dtype}): its weights are quantized, "
                    "and scales are not read. Take weights that are not."
                )
            wanted = _region(torch.empty_like(target, device="meta"), place.target_rows)
            given = _given(info.shape, place)
            if given is None or given != tuple(wanted.shape):
                report.mismatched[name] = (list(given or info.shape), list(wanted.shape))
                break
            covered[id(target)] = covered.get(id(target), 0) + wanted.numel()
            plan.setdefault(name, []).append(place)
    mismatched = {place.target for name in report.mismatched for place in places_of(name) or ()}
    for name, target in state.items():
        done = covered.get(id(target), 0)
        if done >= target.numel() or (done and has_weights(name)):
            report.loaded.append(name)
        elif name in mismatched or any(id(state[x]) == id(target) for x in mismatched if x in state):
            continue
        elif has_weights(name) or re.fullmatch(described.optional_pattern, name):
            report.absent.append(name)
        else:
            report.missing.append(name)
    if not report.is_complete:
        return report
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, leaf))
    for name in report.absent:
        if name.startswith("added_tokens.") and state[name].is_meta:
            # Rows that nothing fills are drawn afterwards, and have to be told from those that the checkpoint fills.
            _materialized(state, owners, name).detach().fill_(torch.nan)
    for name, tensor in checkpoint.read():
        for place in plan.get(name, ()):
            target = _materialized(state, owners, place.target)
            with torch.no_grad():
                _region(target, place.target_rows).copy_(place.transform(_region(tensor, place.source_rows)))
    for name in report.absent:
        if state[name].is_meta:  # not needed: whatever it holds changes nothing
            _materialized(state, owners, name).detach().zero_()
    return report


def mean_rows(first: int, num: int) -> Callable[[Tensor], Tensor]:
    """A table to `num` rows that are each the mean of its first ones: for new tokens of which the table has no row."""

    def change(table: Tensor) -> Tensor:
        return table[:first].mean(0, keepdim=True, dtype=torch.float32).to(table.dtype).expand(num, -1)

    return change


def _region(x: Tensor, rows: slice | None) -> Tensor:
    return x if rows is None else x[rows]


def _given(shape: tuple[int, ...], place: Target) -> tuple[int, ...] | None:
    """The shape that a tensor would have at its place; None if it cannot be changed so."""
    try:
        return tuple(place.transform(_region(torch.empty(shape, device="meta"), place.source_rows)).shape)
    except (RuntimeError, ValueError, IndexError):
        return None


def _materialized(state: dict[str, Tensor], owners: dict[int, list[tuple[nn.Module, str]]], name: str) -> Tensor:
    """A parameter with memory; tied ones share theirs."""
    old = state[name]
    if not old.is_meta:
        return old
    new = nn.Parameter(torch.empty_like(old, device="cpu"), requires_grad=old.requires_grad)
    for module, leaf in owners[id(old)]:
        setattr(module, leaf, new)
    for other, x in state.items():
        if x is old:
            state[other] = new
    return new


def number_of(checkpoint: PublishedCheckpoint, pattern: str) -> int:
    """How many different numbers stand where the pattern has its group.

    Raises:
        CheckpointError: if they are not 0, 1, 2, ….
    """
    numbers = {int(match[1]) for name in checkpoint.tensors if (match := re.match(pattern, name))}
    if numbers != set(range(len(numbers))):
        missing = sorted(set(range(max(numbers) + 1)) - numbers)
        raise CheckpointError(f"{checkpoint.name!r} lacks layer {missing[0]} of those that match {pattern}.")
    return len(numbers)
