"""Hostile files of each kind: an answer, or an error in words; no hang, no code, nothing for the terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.hardening.attempt import Attempt, faults, run_all
from tests.hardening.subjects import KINDS, SLOW_KINDS, Workshop, attempts

#: Cases of each kind in the fast tests; a case costs 20 to 100 ms, and one of a language model more.
FEW = {"image": 12, "composition": 10, "weights": 6, "directory": 8, "delta": 4}
FEW_OF_OTHERS = 2
MANY = 300  # in the long tests


def attack(shop: Workshop, kind: str, seed: int, count: int, folder: Path) -> None:
    """Run cases of a kind, and fail with the list of those that went wrong."""
    cases = list(attempts(shop, kind, [f"{kind} {seed} {i}" for i in range(count)], folder))
    whole, *outcomes = run_all(cases)
    assert whole.code == 0, whole
    wrong = []
    for case, outcome in zip(cases[1:], outcomes, strict=True):
        if found := faults(case, outcome, whole):
            message = (outcome.stderr.strip().splitlines() or [""])[-1][:200]
            wrong.append(f"{case.name}: {', '.join(found)}: exit code {outcome.code}, {message!r}")
    spent = sum(outcome.cpu_seconds for outcome in outcomes)
    print(f"{kind}, seed {seed}: {count} tried, {len(wrong)} wrong, {spent:.1f} s of CPU")
    assert not wrong, f"{len(wrong)} of {count} cases went wrong:\n" + "\n".join(wrong)


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", KINDS)
def test_few(shop: Workshop, kind: str, hardening_seed: int, tmp_path: Path) -> None:
    attack(shop, kind, hardening_seed, FEW.get(kind, FEW_OF_OTHERS), tmp_path)


@pytest.mark.attack
@pytest.mark.parametrize("kind", [*KINDS, *SLOW_KINDS])
def test_many(shop: Workshop, kind: str, hardening_seed: int, tmp_path: Path) -> None:
    attack(shop, kind, hardening_seed + 1, MANY if kind in KINDS else MANY // 3, tmp_path)


def test_an_impossible_number_in_a_configuration_is_no_silent_change(shop: Workshop, tmp_path: Path) -> None:
    edited = Path(shutil.copytree(shop.folder / "model", tmp_path / "edited"))
    config = json.loads((edited / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 3.0
    (edited / "config.json").write_text(json.dumps(config))
    words = ["<image>What?", "-i", str(shop.folder / "images/a.png"), "-n", "8"]
    cases = [
        Attempt(str(model), [["generate", "-m", str(model), *words]], tmp_path)
        for model in (shop.folder / "model", edited)
    ]
    whole, outcome = run_all(cases)
    assert whole.code == 0
    assert "silent" not in faults(cases[1], outcome, whole)
