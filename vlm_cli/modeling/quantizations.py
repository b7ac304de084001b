"""Names of the ways to keep weights in fewer bits. The command line lists them without importing torch."""

from __future__ import annotations

__all__ = ["QUANTIZATIONS"]

#: Values of `--quantize` and of `accelerate(quantize=…)`, and the package that each needs (int8 not on a CPU).
QUANTIZATIONS = {"int8": "torchao", "int4": "bitsandbytes", "fp8": "torchao"}
