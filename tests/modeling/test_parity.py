"""The reference's own weights, inputs and outputs (`tests/parity`, described in docs/architecture.md).

More folders of such cases are tested too if the environment variable VLM_PARITY names where they are.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import Tensor

from tests.support import ROOT
from tests.support.parity import Case, check_text, check_vision, read
from tests.support.tiny import nudged
from vlm_cli.composition import PARTS

HOMES = [ROOT / "tests" / "parity", *(Path(x) for x in [os.environ.get("VLM_PARITY")] if x)]
FOLDERS = sorted(path.parent for home in HOMES for path in home.glob("*/config.json"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def case(request: pytest.FixtureRequest) -> Case:
    return read(request.param)


def test_there_are_cases():
    assert {folder.name for folder in FOLDERS} >= {"flamingo-llama", "kosmos-llama", "blip-opt", "llava-llama"}


@pytest.mark.sample(2)
def test_vision_tokens_are_the_references(case):
    check_vision(case)


def test_logits_and_loss_are_the_references(case):
    check_text(case)


@pytest.mark.sample(2)
def test_greedy_tokens_are_the_references(case):
    for row, expected in enumerate(case.tensors["generated"].tolist()):
        assert case.generate(row, len(expected)) == expected


@pytest.mark.sample(2)
def test_beams_are_the_references(case):
    for row, expected in enumerate(case.tensors["beam3"].tolist()):
        assert case.generate(row, len(expected), num_beams=3) == expected


@pytest.mark.sample(2)
def test_a_changed_weight_of_any_part_is_noticed(case):
    parts = [part for part, module in case.model.part_modules().items() if list(module.parameters())]
    assert set(PARTS) - set(parts) <= {"fusion"}  # the language stream has no weights
    for part in parts:
        weight, at = most_important(case, part)
        checks = (check_text, check_vision) if part.startswith("vision") else (check_text,)
        for check in checks:
            with nudged(weight, at=at), pytest.raises(AssertionError, match="not close"):
                check(case)
        check_text(case)


def most_important(case: Case, part: str) -> tuple[Tensor, int]:
    """The weight of a part on which the loss hangs most: its tensor, and where it is in it."""
    case.model.set_trainable([part])
    case.run().loss.backward()
    weights = [p for p in case.model.parameters() if p.grad is not None]
    weight = max(weights, key=lambda p: p.grad.abs().max())
    at = int(weight.grad.abs().argmax())
    case.model.zero_grad()
    case.model.set_trainable(case.model.config.composition.trainable)
    return weight, at
