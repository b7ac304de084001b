"""Gates: parameters of a fusion that scale what it adds to the language model; at 0 they are closed."""

from __future__ import annotations

__all__ = ["is_gate"]


def is_gate(name: str) -> bool:
    """Say whether a fusion's parameter is a gate: its name ends with `_gate`.

    >>> is_gate("fusion.blocks.1.attn_gate"), is_gate("fusion.blocks.1.ff.gate_proj.weight")
    (True, False)
    """
    return name.endswith("_gate")
