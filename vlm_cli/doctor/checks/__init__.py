"""The checks by theme; to import this package registers them, in the order of these lines.

A check compares the model with itself by a way of its own. The tests in `tests/modeling` compare it with slow
loops, and share no code with the checks: neither can hide a fault of the other.
"""

from vlm_cli.doctor.checks import forward, generation, parameters

__all__ = ["forward", "generation", "parameters"]
