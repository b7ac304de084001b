"""Names of the ways to keep weights in fewer bytes. The command line lists them without importing torch."""

from __future__ import annotations

__all__ = ["QUANTIZATIONS"]

#: Values of `--quantize` and of `accelerate(quantize=…)`; `modeling/acceleration.py` has a function for each.
QUANTIZATIONS = ("int8",)
