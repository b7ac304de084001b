"""`vlm doctor`: what it prints and where, on what, and its exit codes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

from tests.support.grid import first_of
from vlm_cli.doctor import CHECKS, QUICK
from vlm_cli.doctor.finding import Decided


@pytest.fixture
def checked(vlm):
    """`checked(*flags)` is the JSON object of a model that passes."""

    def doctor(*flags: Any) -> dict[str, Any]:
        result = vlm("doctor", *flags, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return doctor


@pytest.fixture
def broken(monkeypatch):
    """One check finds an infinite difference."""

    decide(monkeypatch, "media", Decided("fails", "it is broken", difference=float("inf")))


def decide(monkeypatch: pytest.MonkeyPatch, name: str, result: Decided) -> None:
    """Let a check find this result."""
    monkeypatch.setitem(CHECKS, name, replace(CHECKS[name], measure=lambda subject: result))


def verdicts(data: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in data["checks"]}


def test_the_demo(vlm):
    result = vlm("doctor", "--quick")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for name, line in zip(QUICK, lines, strict=False):
        assert line.startswith(f"✓ {name} ") and f" {CHECKS[name].claim} " in line and " ≤ " in line
    assert lines[len(QUICK) :] == [f"{len(QUICK)} hold"]
    assert result.stderr == "Model demo on cpu, bfloat16\n"


@pytest.mark.matrix
def test_details(vlm):
    result = vlm("doctor", "--quick", "--verbose")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    told = [line.split()[:2] for line in lines[:-1:2]]
    assert told == [["holds", name] for name in QUICK]
    for name, line, numbers in zip(QUICK, lines[:-1:2], lines[1:-1:2], strict=True):
        assert line.endswith(CHECKS[name].proves)
        assert "difference" in numbers and "allowed" in numbers and "a change that must be seen" in numbers
    assert lines[-1] == f"{len(QUICK)} hold"


@pytest.mark.parametrize("family", first_of(["kosmos", "flamingo"]))
def test_a_built_directory(checked, family, request):
    folder = request.getfixturevalue(family)
    data = checked(folder)
    assert verdicts(data) == dict.fromkeys(CHECKS, "holds")
    assert (data["model"], data["device"], data["dtype"], data["passed"]) == (str(folder), "cpu", "float32", True)
    keys = {"name", "proves", "verdict", "difference", "allowed", "twin", "note", "seconds"}
    assert all(set(check) == keys for check in data["checks"])
    assert all(check["difference"] <= check["allowed"] for check in data["checks"])


@pytest.mark.parametrize("family", first_of(["flamingo", "kosmos"]))
def test_a_composition_is_drawn_at_random(vlm, parts, family):
    result = vlm("doctor", *getattr(parts, family), "--quick")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"{len(QUICK)} hold"
    assert "The weights are random." in result.stderr


def test_a_composition_file(checked, flamingo):
    assert set(verdicts(checked(flamingo / "composition.yaml", "--quick")).values()) == {"holds"}


@pytest.mark.matrix
@pytest.mark.parametrize("family", first_of(["flamingo", "kosmos"]))
@pytest.mark.matrix
def test_in_bfloat16(checked, family, request):
    data = checked(request.getfixturevalue(family), "--dtype", "bfloat16")
    assert data["dtype"] == "bfloat16" and set(verdicts(data).values()) == {"holds"}


@pytest.mark.matrix
def test_the_seed_draws_other_prompts(checked, flamingo):
    first, other = (checked(flamingo, "--quick", "--seed", seed)["checks"] for seed in (0, 1))
    assert [check["twin"] for check in first] != [check["twin"] for check in other]


def test_what_fails(vlm, flamingo, broken):
    result = vlm("doctor", flamingo, "--quick")
    assert result.exit_code == 1
    assert re.search(r"^✗ media +another image .* FAILS\n +it is broken\n", result.stdout, re.MULTILINE)
    detailed = vlm("doctor", flamingo, "--quick", "--verbose").stdout
    assert f"FAILS   media      {CHECKS['media'].proves}\n" in detailed
    assert "difference inf; it is broken; " in detailed
    assert result.stdout.endswith(f"{len(QUICK) - 1} hold, 1 FAIL\n")


def test_what_fails_as_json(vlm, flamingo, broken):
    result = vlm("doctor", flamingo, "--quick", "--json")
    data = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result.exit_code == 1 and data["passed"] is False
    found = next(check for check in data["checks"] if check["name"] == "media")
    assert (found["verdict"], found["difference"], found["note"]) == ("fails", None, "it is broken")


def test_a_limit_is_no_failure(vlm, flamingo, monkeypatch):
    decide(monkeypatch, "media", Decided("limit", "the bare language model: it takes no mask"))
    result = vlm("doctor", flamingo, "--quick")
    assert result.exit_code == 0
    assert "the bare language model: it takes no mask" in result.stdout
    assert result.stdout.endswith(f"{len(QUICK) - 1} hold, 1 limited by the language model\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag"], "No such option"),
        (["--seed", "-1"], "--seed"),
        (["--dtype", "bfloat61"], "Did you mean 'bfloat16'?"),
        (["--device", "cuda:77"], "cannot be used here"),
        (["demmo"], "Did you mean 'demo'?"),
    ],
)
def test_wrong_usage(vlm, flags, words):
    result = vlm("doctor", *flags)
    assert result.exit_code == 2 and words in result.stderr and not result.stdout


def test_a_composition_that_does_not_fit_in_memory(vlm, parts, monkeypatch):
    class Memory:
        available = 1000  # bytes

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: self.weight.is_meta or pytest.fail("drawn"))
    result = vlm("doctor", *parts.flamingo)
    assert result.exit_code == 1 and not result.stdout
    assert "the weights of this composition take " in result.stderr
    assert "and 1.0 kB of memory are free. Choose a smaller language model of the same type" in result.stderr
