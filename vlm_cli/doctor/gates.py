"""Set a fusion's gates for a while. A new model's gates are closed, so that text sees no media."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlm_cli.modeling.vlm import VLM

__all__ = ["closed_gates", "has_gates", "opened_gates"]

_CLOSED = 0.05  # a gate below this absolute value hides what media change


def has_gates(model: VLM) -> bool:
    """Tell whether the fusion has any gate."""
    return bool(_gates(model))


@contextmanager
def closed_gates(model: VLM) -> Iterator[None]:
    """Set every gate to 0 inside the block."""
    with _restored_gates(model) as gates:
        for gate in gates:
            gate.data = gate.data * 0
        yield


@contextmanager
def opened_gates(model: VLM) -> Iterator[None]:
    """Set every closed gate to 0.5 inside the block; an open gate keeps its value."""
    with _restored_gates(model) as gates:
        for gate in gates:
            gate.data = torch.where(gate.detach().abs() < _CLOSED, 0.5, gate.detach())
        yield


@contextmanager
def _restored_gates(model: VLM) -> Iterator[list[torch.nn.Parameter]]:
    gates = _gates(model)
    before = [gate.detach().clone() for gate in gates]
    try:
        yield gates
    finally:
        for gate, value in zip(gates, before, strict=True):
            gate.data = value


def _gates(model: VLM) -> list[torch.nn.Parameter]:
    return [p for name, p in model.fusion.named_parameters() if name.endswith("_gate")]
