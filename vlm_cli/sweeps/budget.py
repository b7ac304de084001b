"""`--budget`: how much each run of a sweep may train, in time, steps or floating-point operations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vlm_cli.errors import UsageError
from vlm_cli.schema import show
from vlm_cli.training.data_settings import MOST_STEPS

__all__ = ["Budget"]

_MINUTES = {"s": 1 / 60, "m": 1.0, "min": 1.0, "h": 60.0}
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21}
_NUMBER = r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)"
_MOST_FLOPS = 1e30


@dataclass(frozen=True)
class Budget:
    """What each run may use.

    Attributes:
        text: as the user wrote it.
        unit: of the amount.
        amount: minutes, steps or floating-point operations.
    """

    text: str
    unit: Literal["minutes", "steps", "flops"]
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `10m`, `90s`, `2h`, `500` (steps) or `2e15FLOPs`.

        >>> Budget.parse("90s").amount, Budget.parse("500").unit, Budget.parse("3 PFLOPs").amount
        (1.5, 'steps', 3000000000000000.0)

        Raises:
            UsageError: if it is none of these, or not above 0.
        """
        given = text.strip()
        budget = None
        if found := re.fullmatch(rf"{_NUMBER}\s*(s|m|min|h)", given):
            budget = cls(given, "minutes", float(found[1]) * _MINUTES[found[2]])
        elif found := re.fullmatch(rf"(?i){_NUMBER}\s*([kmgtpez]?)flops?", given):
            budget = cls(given, "flops", float(found[1]) * _FACTORS[found[2].lower()])
        elif re.fullmatch(r"\d{1,12}", given):
            budget = cls(given, "steps", int(given))
        most = _MOST_FLOPS if budget is not None and budget.unit == "flops" else MOST_STEPS
        if budget is None or not 0 < budget.amount <= most:
            raise UsageError(
                f"--budget expects time (10m, 90s, 2h), a number of steps (500) or of operations (2e15FLOPs), above 0, "
                f"got {show(text)}."
            )
        return budget
