"""Set a fusion's gates for a while. A new model's gates are closed, so that text sees no media."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlm_cli.modeling.vlm import VLM

__all__ = ["closed_gates", "opened_gates"]

_CLOSED = 0.05  # a gate below this absolute value hides what media change


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
    gates = list(model.gates().values())
    before = [gate.detach().clone() for gate in gates]
    try:
        yield gates
    finally:
        for gate, value in zip(gates, before, strict=True):
            gate.data = value
