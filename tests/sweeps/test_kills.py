"""A sweep that is killed leaves no process behind, and goes on where it stood; several runs at once; Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.sweeps import launch_here

TRAIN = (
    "--data",
    "train.jsonl",
    "--eval-data",
    "train.jsonl",
    "--batch-size",
    "2",
    "--limit",
    "6",
    "--save-every",
    "1",
)
SETS = ("--set", "vision_tokenizer=linear,mlp")

pytestmark = pytest.mark.matrix


def begin(folder: Path, *words: Any) -> subprocess.Popen[str]:
    """Start `vlm sweep` as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vlm_cli", "sweep", "base.yaml", *map(str, words)]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=-1, stderr=-1)


def processes_of(out: Path) -> list[int]:
    """The processes whose command names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(holds: Any, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_goes_on_after_a_kill(prepared, vlm, monkeypatch, tmp_path, number):
    out = tmp_path / "out"
    words = [*SETS, *TRAIN, "--budget", "300", "--output", out]
    process = begin(prepared, *words)
    try:
        wait_for(lambda: list(out.glob("runs/*/trained.checkpoints/checkpoint-*/complete.json")))
    finally:
        process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    if number == signal.SIGTERM:
        assert f"{out} keeps what is done; the same command goes on." in said
    wait_for(lambda: not processes_of(out))  # the training ends by itself
    assert not list(out.glob("runs/*/trained"))
    [log] = out.glob("runs/*/log.txt")
    before = len(log.read_text())
    monkeypatch.chdir(prepared)
    ran = launch_here(monkeypatch)
    result = vlm("sweep", "base.yaml", *words, "--json")
    assert result.exit_code == 0, result.stderr
    assert "Resuming from" in log.read_text()[before:]
    assert [x[0] for x in ran] == ["train", "eval", "build", "train", "eval"]
    straight = vlm("sweep", "base.yaml", *words[:-1], tmp_path / "straight", "--json")
    found = [json.loads(x.stdout)["compositions"] for x in (result, straight)]
    for one, other in zip(*found, strict=True):
        assert one["scores"] == other["scores"]
        assert one["runs"][0]["loss"] == pytest.approx(other["runs"][0]["loss"], rel=1e-4)
        assert one["runs"][0]["steps"] == other["runs"][0]["steps"] == 300


@pytest.mark.parametrize("how", [["--jobs", "2"], ["--jobs", "2", "--engine", "ray", "--job-cpus", "0.5"]])
def test_several_runs_at_once(prepared, vlm, monkeypatch, tmp_path, how):
    if "ray" in how:
        pytest.importorskip("ray")
    out = tmp_path / "out"
    words = [*SETS, *TRAIN, "--budget", "2"]
    process = begin(prepared, *words, *how, "--output", out, "--json")
    printed, said = process.communicate(timeout=900)
    assert process.returncode == 0, said
    begins = [line for line in said.splitlines() if line.startswith("[")]
    assert ["begins" in line for line in begins] == [True, True, False, False]
    monkeypatch.chdir(prepared)
    launch_here(monkeypatch)
    alone = vlm("sweep", "base.yaml", *words, "--output", tmp_path / "alone", "--json")
    found = [json.loads(x)["compositions"] for x in (printed, alone.stdout)]
    assert [x["scores"] for x in found[0]] == [x["scores"] for x in found[1]]
