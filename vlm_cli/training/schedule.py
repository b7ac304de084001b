"""Transformers' schedules of the learning rate, by name, for runs that end after steps or after minutes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from vlm_cli.errors import UsageError, first_line
from vlm_cli.registry import suggest
from vlm_cli.training.settings import TrainingSettings

__all__ = ["LearningRateSchedule", "make_schedule"]

_OURS = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # arguments that no user sets


def make_schedule(settings: TrainingSettings, highest: float = 1.0) -> LearningRateSchedule:
    """Make the schedule of a run.

    Raises:
        UsageError: if the schedule does not take the options that the settings give.
    """
    return LearningRateSchedule(
        settings.schedule, warmup=settings.warmup_steps, options=settings.schedule_options, highest=highest
    )


class LearningRateSchedule:
    """The learning rate at a step, as a share of the highest.

    Where minutes limit a run, the number of its steps is estimated anew at each step, so that both end together.

    >>> schedule = LearningRateSchedule("linear", warmup=4)
    >>> [schedule.factor(step, 8) for step in range(9)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]

    Args:
        name: Transformers' name. `constant` has a warm-up, too.
        warmup: number of steps in which the rate rises; below 1, a share of the run.
        options: further arguments of Transformers' function, such as `min_lr_rate`. A number of steps (`num_…_steps`)
            below 1 is a share of the run.
        highest: the highest learning rate, in whose unit `min_lr` and `lr_end` are.

    Raises:
        UsageError: if Transformers' function does not take these options.
    """

    def __init__(
        self, name: str, *, warmup: float = 0.0, options: Mapping[str, Any] | None = None, highest: float = 1.0
    ) -> None:
        self.name = "constant_with_warmup" if name == "constant" else name
        self.warmup, self.options = warmup, dict(options or {})
        self._optimizer = SGD([torch.zeros(1)], lr=highest)
        self._check_options()

    def factor(self, step: int, steps: float) -> float:
        """Return the learning rate after so many steps, as a share of the highest.

        Args:
            step: number of steps that are done.
            steps: number of steps of the run, as far as is known.
        """

        def count(number: float) -> float:
            return number if number >= 1 else number * steps

        options = {name: count(x) if _is_steps(name) else x for name, x in self.options.items()}
        optimizer = SGD(self._optimizer.param_groups[0]["params"], lr=self._optimizer.defaults["lr"])
        made: Any = get_scheduler(self.name, optimizer, count(self.warmup), steps, options)  # type: ignore[arg-type]
        assert isinstance(made, LambdaLR)
        return float(made.lr_lambdas[0](step))

    def _check_options(self) -> None:
        """Try the schedule.

        Raises:
            UsageError: naming the option, and those that there are.
        """
        function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(self.name)]
        known = inspect.signature(function).parameters
        names = [name for name in known if name not in _OURS]
        takes = f"{self.name} takes {', '.join(names)}." if names else f"{self.name} takes none."
        for name in self.options:
            if name not in names:
                raise UsageError(f"unknown setting {name!r} in --schedule-options.{suggest(name, names)} {takes}")
        try:
            self.factor(0, 2)
            self.factor(1, 2)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise UsageError(
                f"--schedule {self.name} cannot be made: {first_line(error)}. Add --schedule-options NAME=X; {takes}"
            ) from None


def _is_steps(name: str) -> bool:
    return name.startswith("num_") and name.endswith("_steps")
