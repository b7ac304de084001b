"""Stop a run as soon as its loss or its gradient is not a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_cli.errors import TrainingError
from vlm_cli.training.checkpoints import Checkpoints
from vlm_cli.training.dataset import RecordDataset
from vlm_cli.training.streaming import StreamedRecords

__all__ = ["FiniteWatch"]


class FiniteWatch:
    """Collect numbers that must be finite, and check them without making an accelerator wait.

    To read a number from an accelerator, the process waits until the accelerator has computed it. So `add` checks only
    numbers on the CPU, and the caller calls `check` where the process waits anyway: before it reports, evaluates or
    writes a checkpoint.

    Args:
        records: the records that the run learns, named in the error.
        checkpoints: the checkpoints of the run, the last of which the error recommends.
    """

    def __init__(self, records: RecordDataset | StreamedRecords, checkpoints: Checkpoints) -> None:
        self.records, self.checkpoints = records, checkpoints
        self._unchecked: list[tuple[int, str, list[Any], Tensor]] = []

    def add(self, step: int, name: str, records: list[Any], value: Tensor) -> None:
        """Collect a number.

        Args:
            step: the step to which the number belongs.
            name: "loss" or "gradient".
            records: indices of the records from which the number was computed.
            value: float[] the number.
        """
        self._unchecked.append((step, name, records, value))
        if value.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Check every number that was collected since the last check.

        Raises:
            TrainingError: naming the first step, and its records, whose loss or gradient is not a number.
        """
        unchecked, self._unchecked = self._unchecked, []
        for step, name, records, value in unchecked:
            if not bool(torch.isfinite(value)):
                raise TrainingError(
                    f"the {name} is {float(value)} at step {step}, in the records {self.records.describe(records)}. "
                    f"{self._advice()} and a lower --learning-rate or --max-grad-norm, without --bf16, or with "
                    "corrected records."
                )

    def _advice(self) -> str:
        last = self.checkpoints.last()
        if last is None:
            return "No checkpoint was written before it; repeat the command"
        return f"The last good state is {str(last.path)!r}; repeat the command with --resume"
