"""In half precision, doctor judges the same weights in float32 too, where an error cannot hide behind rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.support import tiny
from vlm_cli.doctor import float32
from vlm_cli.doctor.check import Check
from vlm_cli.doctor.finding import Finding, Measured
from vlm_cli.doctor.float32 import judge_in_both
from vlm_cli.doctor.judge import judge
from vlm_cli.doctor.subject import WholeModel
from vlm_cli.modeling.vlm import VLM


@pytest.fixture(scope="module")
def model() -> VLM:
    return copy.deepcopy(tiny.build()).bfloat16()


def check(in_half: float, in_float32: float, twin: float = 40.0) -> Check:
    """A check that measures these differences, of logits up to 16."""

    def measure(subject: WholeModel) -> Measured:
        is_half = subject.model.dtype == torch.bfloat16
        return Measured(in_half if is_half else in_float32, 16.0, twin=twin)

    return Check("x", "x", "x", measure)


def found(model: VLM, tmp_path: Any, what: Check) -> Finding:
    before = {name: x.clone() for name, x in model.state_dict().items()}
    finding = judge_in_both(what, WholeModel(model, 0, tmp_path), [])
    after = model.state_dict()
    assert all(torch.equal(after[name], x) and after[name].dtype == x.dtype for name, x in before.items())
    return finding


def test_an_error_that_bfloat16_hides_is_seen(model, tmp_path):
    hidden = check(in_half=0.9, in_float32=0.9)
    assert judge(hidden, WholeModel(model, 0, tmp_path), []).verdict == "holds"
    finding = found(model, tmp_path, hidden)
    assert finding.verdict == "fails" and finding.allowed < 1e-2
    assert "in float32, on the same weights; in bfloat16 the two ways differ by 9.0e-01" in finding.note


def test_a_difference_of_rounding_alone_is_no_failure(model, tmp_path):
    finding = found(model, tmp_path, check(in_half=13.23, in_float32=1e-5))
    assert finding.verdict == "limit" and finding.difference == 1e-5
    assert "differ by 1.3e+01, and 1.0e+00 is allowed; in float32 the same weights agree" in finding.note


def test_what_holds_in_both_holds(model, tmp_path):
    finding = found(model, tmp_path, check(in_half=0.1, in_float32=1e-5))
    assert (finding.verdict, finding.difference) == ("holds", 1e-5)


def test_numbers_that_are_not_finite_stay_failures(model, tmp_path):
    assert found(model, tmp_path, check(in_half=float("inf"), in_float32=1e-5)).verdict == "fails"


def test_without_memory_the_dtype_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(float32, "_has_room", lambda model: False)
    finding = found(model, tmp_path, check(in_half=0.9, in_float32=0.9))
    assert finding.verdict == "holds" and "bfloat16 lets no difference below 1.0e+00 be seen" in finding.note
