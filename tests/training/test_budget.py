"""`--max-minutes`: the run keeps the promise, and the schedule follows training and not the held-out loss."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vlm_cli.training import budget as module
from vlm_cli.training.budget import EndInTime, RunBudget


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Control:
    should_training_stop = should_evaluate = False


class State:
    global_step = 0


class Arguments:
    world_size = 1


def run(monkeypatch, *, minutes: float, step: float, evaluation: float, every: int) -> tuple[list[float], float]:
    """Run steps and held-out losses of these seconds; return the progress at each step, and the seconds of the run."""
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    budget = RunBudget(None, minutes, pause_every=every, eval_steps=2 * evaluation / step)
    ends = EndInTime(budget, is_interrupted=lambda: False, evaluates=True)
    state, control, progress = State(), Control(), []
    ends.on_train_begin(Arguments(), state, control)
    while not control.should_training_stop:
        ends.on_step_begin(Arguments(), state, control)
        progress.append(budget.progress(state.global_step))
        clock.now += step
        state.global_step += 1
        control.should_evaluate = pauses = state.global_step % every == 0
        ends.on_step_end(Arguments(), state, control)
        if control.should_evaluate:
            with budget.pause("eval"):
                clock.now += evaluation
        if pauses or control.should_training_stop:
            with budget.pause("checkpoint"):
                clock.now += 1
    return progress, budget.seconds


@pytest.mark.parametrize("evaluation", [0.5, 50, 100])
@pytest.mark.parametrize("every", [30, 500])
def test_minutes_hold_the_last_held_out_loss_and_the_schedule_is_even(monkeypatch, evaluation, every):
    progress, seconds = run(monkeypatch, minutes=6, step=0.5, evaluation=evaluation, every=every)
    assert 359 < seconds <= 362  # a run ends after the step in which its time is over
    steps = [after - before for before, after in pairwise(progress)]
    assert progress[0] == 0 and progress[-1] > 0.9
    assert min(steps) >= 0 and max(steps) < 0.05


def test_without_minutes_steps_alone_count(monkeypatch):
    monkeypatch.setattr(module.time, "monotonic", Clock().monotonic)
    budget = RunBudget(8, None)
    assert [budget.progress(step) for step in (0, 4, 8)] == [0, 0.5, 1]
    assert not budget.is_over(7, 1e9) and budget.is_over(8, 0)
