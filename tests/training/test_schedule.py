"""Schedules of the learning rate are Transformers', in runs of steps and of minutes."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from vlm_cli.errors import UsageError
from vlm_cli.training.budget import RunBudget
from vlm_cli.training.learning_settings import Schedule
from vlm_cli.training.schedule import LearningRateSchedule

NAMES = get_args(Schedule)
#: Settings without which Transformers does not make a schedule.
NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 0.01, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 10, "decay_type": "linear"},
    "polynomial": {"power": 2.0, "lr_end": 0.001},
    "cosine_with_restarts": {"num_cycles": 3},
}


def test_the_names_are_those_of_transformers() -> None:
    assert set(NAMES) == {x.value for x in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_each_schedule_is_that_of_transformers(name: str, warmup: int) -> None:
    options = NEEDED.get(name, {})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    published = "constant_with_warmup" if name == "constant" else name
    theirs: Any = get_scheduler(published, optimizer, warmup, 50, options)
    ours = LearningRateSchedule(name, warmup=warmup, options=options, highest=0.5)
    others = set()
    for done in range(50):
        assert 0.5 * ours.factor(done, 50) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        others.add(round(0.5 * ours.factor(done, 40), 9))
        optimizer.step()
        theirs.step()
    assert len(others) > 2 or name.startswith("constant")


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_over_time_is_the_schedule_over_steps(name: str) -> None:
    """Steps that take equally long: a run of 40 of them is as a run of so many minutes."""
    ours = LearningRateSchedule(name, warmup=0.25, options=NEEDED.get(name))
    budget = RunBudget(None, 40 / 60)
    found = []
    for step in range(41):
        budget.seconds_at_step = float(step)
        found.append(ours.factor(step, budget.expected_steps(step)))
    wanted = [ours.factor(step, 40) for step in range(41)]
    assert found[1:] == pytest.approx(wanted[1:], abs=1e-6)
    assert found[0] == (0.2 if name == "cosine_warmup_with_min_lr" else 0.0)


def test_a_number_of_steps_below_one_is_a_share() -> None:
    shared = LearningRateSchedule("warmup_stable_decay", warmup=0.1, options={"num_decay_steps": 0.5})
    counted = LearningRateSchedule("warmup_stable_decay", warmup=4, options={"num_decay_steps": 20})
    for step in range(41):
        assert shared.factor(step, 40) == pytest.approx(counted.factor(step, 40))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "cosine",
            {"min_lr_rate": 0.1},
            "unknown setting 'min_lr_rate' in --schedule-options. cosine takes num_cycles.",
        ),
        ("constant", {"power": 1}, "constant_with_warmup takes none."),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("cosine_with_min_lr", {}, "min_lr"),
        ("cosine_with_min_lr", {"min_lr_rate": "low"}, "Add --schedule-options NAME=X"),
    ],
)
def test_settings_that_a_schedule_does_not_take(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        LearningRateSchedule(name, options=options)
    assert words in str(error.value)
