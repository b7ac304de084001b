"""How long a run may take, in steps, in minutes or in both, and how much of that is used."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

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
        max_minutes: limit in minutes, held-out losses and checkpoints included; None if only steps limit the run.
        pause_every: steps between two checkpoints, at which the held-out loss is measured.
        eval_steps: held-out records, in steps of as many records; 0 without held-out records.
    """

    def __init__(
        self, max_steps: int | None, max_minutes: float | None, *, pause_every: int = 1, eval_steps: float = 0
    ) -> None:
        self.max_steps = max_steps
        self.steps = _UNLIMITED if max_steps is None else max_steps
        self.max_seconds = None if max_minutes is None else 60 * max_minutes
        self.seconds_at_step = 0.0
        self._steps_before, self._seconds_before = 0, 0.0  # of the run before it was resumed
        self._started: float | None = None
        self.reserved = 0.0  # seconds that the end of the run takes, as agreed when the step began
        self._furthest = 0.0  # share of the time that was done at the last step
        self._pause_every, self._eval_steps = pause_every, eval_steps
        self._paused = 0.0  # seconds between steps, for held-out losses and checkpoints
        self._last: dict[str, float] = {}  # what was done between steps -> seconds of the last time
        self._is_pause_due = False  # whether the last step is one behind which a pause is still to come
        self._first_step: float | None = None  # seconds of the first step since the start or the resume, a slow one

    @contextlib.contextmanager
    def pause(self, what: Literal["eval", "checkpoint"]) -> Iterator[None]:
        """Count the time of the block, which is no training; the end of the run will take as long again."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self._paused += seconds
            self._is_pause_due = False
            self._last[what] = seconds

    def expected_pause(self, step: int) -> float:
        """Return the seconds that the next held-out loss and checkpoint take, as also at the end of the run.

        Before the first was measured, a held-out record counts as half of a record that trains.
        """
        evaluation = self._last.get("eval", 0.5 * self._eval_steps * self.seconds_per_step(step))
        return evaluation + self._last.get("checkpoint", 0.0)

    def seconds_per_step(self, step: int) -> float:
        """Return the mean duration of a step since the start or the resume, without pauses."""
        return self._trained() / max(step - self._steps_before, 1)

    def _trained(self) -> float:
        return max(0.0, self.seconds_at_step - self._seconds_before - self._paused)

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

    @property
    def training_seconds(self) -> float:
        """Seconds of training until now without the pauses since the start or the resume."""
        return self.seconds - self._paused

    def is_over(self, step: int, seconds: float) -> bool:
        """Tell whether the run ends after this step and this many seconds."""
        return step >= self.steps or (self.max_seconds is not None and seconds >= self.max_seconds - self.reserved)

    def has_room(self, step: int) -> bool:
        """Tell whether a held-out loss may be measured now, and another one at the end."""
        return self.max_seconds is None or (
            self.seconds_at_step + 2 * self.seconds_per_step(step) + self.expected_pause(step)
            < self.max_seconds - self.reserved
        )

    def progress(self, step: int) -> float:
        """Return the share of the run that is done: of its steps or of its minutes, whichever is larger.

        Of the minutes, only those of training count, so that a long held-out loss is no jump in the schedule.
        """
        # Where the estimates become better, the schedule waits, and never goes back.
        self._furthest = max(self._furthest, self._progress_in_time(step))
        return max(step / self.steps, self._furthest)

    def expected_steps(self, step: int) -> float:
        """Return the number of steps that the whole run will have, as far as is known at this step."""
        if self.max_seconds is None:
            return self.steps
        progress = self.progress(step)
        return step / progress if step and progress else self.steps

    def _progress_in_time(self, step: int) -> float:
        if self.max_seconds is None:
            return 0.0
        trained = self._seconds_before + self._trained()
        left = self._training_left(step, max(0.0, self.max_seconds - self.reserved - self.seconds_at_step))
        return trained / (trained + left) if trained + left else 1.0

    def _training_left(self, step: int, seconds: float) -> float:
        """Return how many of the seconds that are left are for training.

        With `t` for the steps between two pauses and `p` for a pause:

            ──t──┤p├────t────┤p├────t────┤p├──t──┤    training is left for each t that begins
        """
        per_step, pause = self.seconds_per_step(step), self.expected_pause(step)
        period = self._pause_every * per_step
        first = period - (step % self._pause_every) * per_step  # seconds of training until the next pause
        if seconds <= first + pause or not period:  # the last held-out loss then stands for the next one
            return seconds
        whole, rest = divmod(seconds - first - pause, period + pause)
        return first + whole * period + min(rest, period)

    def note_step(self, step: int) -> None:
        """Hear that a step has ended."""
        self._is_pause_due = step % self._pause_every == 0
        if self._first_step is None and step == self._steps_before + 1:
            self._first_step = self.seconds - self._seconds_before - self._paused

    def seconds_left(self, step: int) -> float:
        """Estimate the seconds until the end: those of the steps, and of the pauses between them and at the end.

        The first step since the start or the resume prepares much, so it counts only while there is no other.
        """
        seconds, done = self.seconds, step - self._steps_before
        trained = max(0.0, seconds - self._seconds_before - self._paused)
        if done > 1 and self._first_step is not None:
            trained, done = trained - self._first_step, done - 1
        per_step = trained / max(done, 1)
        evaluation = self._last.get("eval", 0.5 * self._eval_steps * per_step)
        pauses = -(-self.steps // self._pause_every) - step // self._pause_every + self._is_pause_due
        left = (self.steps - step) * per_step + pauses * (evaluation + self._last.get("checkpoint", 0.0))
        return max(0.0, left if self.max_seconds is None else min(left, self.max_seconds - self.reserved - seconds))


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
        budget = self.budget
        clock = [budget.seconds, budget.expected_pause(state.global_step)]
        if budget.max_seconds is not None and args.world_size > 1:  # the main process's clock counts
            clock = broadcast(torch.tensor(clock, device=args.device)).tolist()
        budget.seconds_at_step, budget.reserved = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        budget, step = self.budget, state.global_step
        budget.note_step(step)
        if budget.is_over(step, budget.seconds_at_step):
            control.should_training_stop = control.should_save = control.should_log = True
            control.should_evaluate = self.evaluates
            return
        if not budget.has_room(step):
            control.should_evaluate = False
        if self.is_interrupted():
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_interrupted():  # the signal came after the step: its checkpoint is written
            control.should_training_stop = True
