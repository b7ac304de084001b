"""What a run tells while it is under way, and what it has reached at its end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_cli.report.examination import Examination
    from vlm_cli.training.metrics import MetricsLog

__all__ = ["RunOutcome", "StepReport", "TrainingResult"]


@dataclass(frozen=True)
class StepReport:
    """How far a run has come."""

    step: int
    total_steps: int | None  # None: only minutes limit the run
    loss: float | None  # mean of the steps since the last report; None in a report of the held-out loss
    eval_loss: float | None
    images_per_second: float
    seconds_left: float
    epoch: float | None = None  # passes over the records
    learning_rate: float | None = None
    grad_norm: float | None = None  # before it was scaled down
    tokens_per_second: float | None = None
    examination: Examination | None = None  # answers to held-out questions


@dataclass(frozen=True)
class RunOutcome:
    """What a run has reached when its budget is used.

    Attributes:
        steps: steps that are done, those before a resume included.
        seconds: seconds of training, those before a resume included.
        images: images that the model has seen, repeats included.
        metrics: the log, which holds the losses.
        gathered: the weights, by name, of a model that FSDP or DeepSpeed spread over the processes; complete in the
            main process only. None if the model itself holds its weights.
        best_step: the step whose weights the model has now, if the best are kept and not the last.
    """

    steps: int
    seconds: float
    images: int
    metrics: MetricsLog
    gathered: dict[str, Tensor] | None
    best_step: int | None = None

    @property
    def eval_loss(self) -> float | None:
        """The held-out loss of the weights that the model has; None if it was not measured."""
        if self.best_step is None:
            return self.metrics.last("eval_loss")
        return next(x["eval_loss"] for x in self.metrics.entries if "eval_loss" in x and x["step"] == self.best_step)


@dataclass(frozen=True)
class TrainingResult:
    """What `train_model` returns, and `vlm train --json` prints."""

    output: Path
    steps: int
    records: int
    images: int  # images that the model has seen, repeats included
    seconds: float  # of training
    loss: float | None  # the last that was logged
    eval_loss: float | None  # the last that was measured
    images_per_second: float
    trainable_parameters: int
    resumed_from: int | None  # step
    checkpoints: Path | None  # the folder, if it was kept
    skipped: int = 0  # rows of a stream that could not be used, repeats included
    best_step: int | None = None  # whose weights OUT has, if the best were to be kept

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "output": str(self.output), "checkpoints": self.checkpoints and str(self.checkpoints)}
