"""Callbacks of a run that need no trainer: they tell its steps, and continue sums that a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from vlm_cli.training.budget import RunBudget
from vlm_cli.training.checkpoints import UnloggedLosses

__all__ = ["RestoreLosses", "TellSteps"]


class TellSteps(TrainerCallback):
    """Tell after each step how far the run is."""

    def __init__(self, budget: RunBudget, tell: Callable[[int, int | None, float], None]) -> None:
        self.budget, self.tell = budget, tell

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(state.global_step, self.budget.max_steps, math.inf)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(state.global_step, self.budget.max_steps, self.budget.seconds_left(state.global_step))


class RestoreLosses(TrainerCallback):
    """Continue the sum of losses that a checkpoint holds, after Transformers' Trainer has set its own sum to 0."""

    def __init__(self, unlogged: UnloggedLosses | None, restore: Callable[[UnloggedLosses], None]) -> None:
        self.unlogged, self.restore = unlogged, restore

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.unlogged is not None:
            self.restore(self.unlogged)
