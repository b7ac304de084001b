"""The tensors of a class of Transformers, taken from a VLM: the import's tables of names, read backwards.

import:  a tensor of the class  ->  what it fills in a VLM (`Target`)
export:  a tensor of the class  <-  the same targets
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm_cli.checkpoint.published.tables import scale_rows
from vlm_cli.checkpoint.published.targets import Target
from vlm_cli.modeling.language_model import embedding_scale, find_tables
from vlm_cli.modeling.vlm import VLM

__all__ = ["Plan", "added_embedding", "plan_tensors"]

#: Names in a VLM that hold the rows of added tokens, which become rows of the language model's tables.
_ADDED = "added_tokens."


@dataclass(frozen=True)
class Plan:
    """Where each tensor of a class comes from.

    Attributes:
        targets: name of the class -> names of the VLM.
        unfilled: names of the class that a VLM does not have.
        left_over: names of the VLM that the class does not have, and the model needs.
        misfit: names of the class whose tensor has another shape than the VLM's.
    """

    targets: Mapping[str, Sequence[Target]]
    unfilled: Sequence[str]
    left_over: Sequence[str]
    misfit: Sequence[str]

    def gather(
        self, model: VLM, theirs: nn.Module, tables: Sequence[Tensor], *, has_added_rows: bool
    ) -> dict[str, Tensor]:
        """Return the tensors of the class, with the numbers of a VLM.

        Args:
            model: the VLM.
            theirs: of the class; it may be on the meta device.
            tables: the language model's embedding and head, as the class has them.
            has_added_rows: whether the tables of the class have a row for each added token.
        """
        ours, added = model.state_dict(), model.added_tokens
        rows_of = (added_embedding(model), added.head.weight) if has_added_rows else (None, None)
        made = dict(zip(_name_tables(model), zip(tables, rows_of, strict=True), strict=True))
        state: dict[str, Tensor] = {}
        for name, like in theirs.state_dict().items():
            if not (targets := _without_added(self.targets.get(name, ()))):
                continue
            if (table := made.get(targets[0].target)) is not None:
                state[name] = _make_table(*table, added.first_id, len(like))
            else:
                state[name] = _restore(targets, ours, like.shape)
        return {name: x.detach().contiguous() for name, x in state.items()}


def _without_added(targets: Sequence[Target]) -> Sequence[Target]:
    """Leave out rows of added tokens, which `_make_table` adds, unless the class has a table for them alone."""
    return [x for x in targets if not x.target.startswith(_ADDED)] or targets[:1]


def added_embedding(model: VLM) -> Tensor:
    """Return the rows that added tokens have in the language model's table, which its embedding may multiply."""
    scale = embedding_scale(model.lang_model.get_input_embeddings())
    rows, head = model.added_tokens.embedding.weight, model.added_tokens.head.weight
    if rows.shape == head.shape and torch.equal(rows, scale_rows(head, scale)):
        return head  # they were tied, and are so again to the last digit
    return scale_rows(rows, 1 / scale)


def _make_table(base: Tensor, rows: Tensor | None, first: int, size: int) -> Tensor:
    """Put the rows of added tokens, from row `first` on, into a language model's table of `size` rows.

    A table that ends before them stays as it is: the class has another table for them.
    """
    if rows is None or size <= first:
        assert len(base) == size, f"the table has {len(base)} rows, and {size} in the class"
        return base
    table = base.new_zeros(size, base.shape[1])
    table[: len(base)] = base
    table[first : first + len(rows)] = rows
    return table


def _restore(targets: Sequence[Target], ours: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """Make a tensor of the class from all that it fills in a VLM."""
    if len(targets) == 1 and targets[0].source_rows is None:
        return targets[0].give_back(ours[targets[0].target])
    found = ours[targets[0].target].new_full(tuple(shape), torch.nan)
    for target in targets:
        rows = found if target.source_rows is None else found[target.source_rows]
        rows.copy_(target.give_back(ours[target.target]))
    assert not found.isnan().any(), "a tensor of the class has rows that no tensor of the model fills"
    return found


def plan_tensors(
    model: VLM, theirs: nn.Module, targets_of: Callable[[str], Sequence[Target] | None], unneeded: str
) -> Plan:
    """Find what each tensor of a class is in a VLM; both may be on the meta device.

    Args:
        model: the VLM.
        theirs: of the class.
        targets_of: the import's table of names.
        unneeded: pattern of names that a VLM has and does not need.
    """
    ours = model.state_dict()
    targets: dict[str, Sequence[Target]] = {}
    unfilled: list[str] = []
    used: set[str] = set()
    misfit: list[str] = []
    tables = _name_tables(model)
    for name, like in theirs.state_dict().items():
        found = targets_of(name)
        if found is None or any(x.target not in ours or not x.is_reversible for x in found):
            unfilled.append(name)
        elif found:
            targets[name] = found
            used |= {x.target for x in found}
            if found[0].target not in tables and not all(_fits(x, like, ours[x.target]) for x in found):
                misfit.append(name)
    left = [x for x in ours if x not in used and not x.startswith(_ADDED) and not re.fullmatch(unneeded, x)]
    return Plan(targets, unfilled, _without_tied(model, used, left), misfit)


def _name_tables(model: VLM) -> list[str]:
    """Return the names of the language model's two tables, to which a class may add rows."""
    return [f"lang_model.{name}" for name in find_tables(model.lang_model)]


def _fits(target: Target, theirs: Tensor, ours: Tensor) -> bool:
    """Say whether a tensor of the class has the shape of what it fills."""
    return target.selected_shape(tuple(theirs.shape)) == tuple(target.region(ours.to("meta")).shape)


def _without_tied(model: VLM, used: set[str], left: Sequence[str]) -> list[str]:
    """Leave out names of tensors that are the same as one with another name."""
    state = model.state_dict(keep_vars=True)
    seen = {id(state[name]) for name in used if name in state}
    return [name for name in left if id(state[name]) not in seen]
