"""How many parameters each part has, which train, and what they weigh; tied weights count once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vlm_cli.modeling.adapters import adapter_parameters
from vlm_cli.modeling.quantizations import QUANTIZATIONS
from vlm_cli.modeling.quantizing import quantized_bytes
from vlm_cli.modeling.vlm import VLM

__all__ = ["ParameterReport", "ParameterRow", "count_memory", "count_parameters"]


@dataclass(frozen=True)
class ParameterRow:
    """One part, or a module inside of one at `depth` > 1.

    Attributes:
        name: dotted name.
        depth: 1 for a part.
        parameters, trainable, frozen: numbers of scalars.
        share: fraction of the model's parameters.
        bytes: of the parameters in the model's dtype.
        adapter: how many of the trainable ones are an adapter's, which the other tensors can do without.
    """

    name: str
    depth: int
    parameters: int
    trainable: int
    frozen: int
    share: float
    bytes: int
    adapter: int = 0


@dataclass(frozen=True)
class ParameterReport:
    """Rows in the order of the data flow, and their total."""

    rows: list[ParameterRow]
    total: ParameterRow
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "parts": [asdict(row) for row in self.rows], "total": asdict(self.total)}


def count_parameters(model: VLM, *, depth: int = 1, dtype: torch.dtype | None = None) -> ParameterReport:
    """Count a model, on any device; on the meta device nothing is allocated.

    Args:
        model: the model.
        depth: 1 for the parts, 2 for their modules, and so on.
        dtype: what the weights are, for the bytes; None takes that of each parameter.
    """
    owners: set[int] = set()
    adapters = {id(p) for _, p in adapter_parameters(model)}
    total = sum(p.numel() for p in model.parameters())
    rows: list[ParameterRow] = []

    def row(name: str, level: int, parameters: list[nn.Parameter]) -> ParameterRow:
        count = sum(p.numel() for p in parameters)
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        size = sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters)
        added = sum(p.numel() for p in parameters if id(p) in adapters)
        share = count / total if total else 0.0
        return ParameterRow(name, level, count, trainable, count - trainable, share, size, added)

    def visit(name: str, module: nn.Module, level: int) -> None:
        mine = [p for p in module.parameters() if id(p) not in owners]
        rows.append(row(name, level, mine))
        if level < depth:
            for own_name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in owners:
                    rows.append(row(f"{name}.{own_name}", level + 1, [parameter]))
            for child_name, child in module.named_children():
                if any(id(p) not in owners for p in child.parameters()):
                    visit(f"{name}.{child_name}", child, level + 1)
        owners.update(id(p) for p in mine)

    for name, module in model.part_modules().items():
        visit(name, module, 1)
    dtypes = {str(dtype or p.dtype).removeprefix("torch.") for p in model.parameters()}
    return ParameterReport(rows, row("total", 1, list(model.parameters())), "+".join(sorted(dtypes)))


def count_memory(model: VLM, dtype: torch.dtype | None = None) -> dict[str, dict[str, int]]:
    """Count the bytes of each part's weights: as they are, and in each of `QUANTIZATIONS`.

    Args:
        model: not quantized; on the meta device nothing is allocated.
        dtype: of weights that are not quantized; None takes the model's.
    """
    dtype = dtype or model.dtype
    plain = {row.name: row.bytes for row in count_parameters(model, dtype=dtype).rows}
    return {str(dtype).removeprefix("torch."): plain} | {
        name: quantized_bytes(model, name, dtype) for name in QUANTIZATIONS
    }
