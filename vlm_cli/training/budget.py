"""How long a run may take, in steps, in minutes or in both, and how much of that is used."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast
from transformers import TrainerCallback

__all__ = ["EndInTime", "RunBudget"]

_UNLIMITED = 10**9  # steps; Transformers wants a number even if only minutes limit the run


class RunBudget:
    """The steps and minutes that a run may take. The limit that is reached first ends the run.

    Several processes must take the same decisions, so decisions about a step use `seconds_at_step`, the time on which
    the processes agreed when the step began.

    Args:
        max_steps: limit in steps of the optimizer; None if only minutes limit the run.
        max_minutes: limit in minutes of training; None if only steps limit the run.
    """

    def __init__(self, max_steps: int | None, max_minutes: float | None) -> None:
        self.max_steps = max_steps
        self.steps = _UNLIMITED if max_steps is None else max_steps
        self.max_seconds = None if max_minutes is None else 60 * max_minutes
        self.seconds_at_step = 0.0
        self._steps_before, self._seconds_before = 0, 0.0  # of the run before it was resumed
        self._started: float | None = None

    def continue_from(self, step: int, seconds: float) -> None:
        """Count the steps and the seconds that the run took before it was interrupted."""
        self._steps_before, self._seconds_before, self.seconds_at_step = step, seconds, seconds

    def start(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training until now, those before a resume included."""
        return self._seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)

    def is_over(self, step: int, seconds: float) -> bool:
        """Tell whether the run ends after this step and this many seconds."""
        return step >= self.steps or (self.max_seconds is not None and seconds >= self.max_seconds)

    def progress(self, step: int) -> float:
        """Return the share of the run that is done: of its steps or of its minutes, whichever is larger."""
        in_time = 0.0 if self.max_seconds is None else self.seconds_at_step / self.max_seconds
        return max(step / self.steps, in_time)

    def seconds_left(self, step: int) -> float:
        """Estimate the seconds until the end from the mean duration of the steps since the start or the resume."""
        seconds = self.seconds
        per_step = (seconds - self._seconds_before) / max(step - self._steps_before, 1)
        left = (self.steps - step) * per_step
        return max(0.0, left if self.max_seconds is None else min(left, self.max_seconds - seconds))


class EndInTime(TrainerCallback):
    """Run the clock of a budget, and end the run with a checkpoint when the budget is used or after a signal.

    A run that a signal ends and that is resumed must equal a run without the signal. So the signal adds a checkpoint,
    and changes nothing in what is logged and measured: to measure the held-out loss draws random numbers.

    Args:
        budget: the budget of the run.
        is_interrupted: tells whether a signal has arrived.
        evaluates: measure the held-out loss at the end.
    """

    def __init__(self, budget: RunBudget, *, is_interrupted: Callable[[], bool], evaluates: bool) -> None:
        self.budget, self.is_interrupted, self.evaluates = budget, is_interrupted, evaluates

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.budget.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = self.budget.seconds
        if self.budget.max_seconds is not None and args.world_size > 1:  # the main process's clock counts
            seconds = float(broadcast(torch.tensor(seconds, device=args.device)))
        self.budget.seconds_at_step = seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.budget.is_over(state.global_step, self.budget.seconds_at_step):
            control.should_training_stop = control.should_save = control.should_log = True
            control.should_evaluate = self.evaluates
        elif self.is_interrupted():
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_interrupted():  # the signal came after the step: its checkpoint is written
            control.should_training_stop = True
