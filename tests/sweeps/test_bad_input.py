"""Sweeps that cannot be, that fail in part, or whose inputs change."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.support.sweeps import launch_here
from vlm_cli.errors import UsageError
from vlm_cli.locks import locked
from vlm_cli.sweeps.budget import Budget

TRAIN = ("--data", "train.jsonl", "--eval-data", "train.jsonl", "--budget", "1", "--batch-size", "2", "--limit", "2")
SETS = ("--set", "vision_tokenizer=linear,mlp")


@pytest.fixture
def own(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, whose files a test may change."""
    for name in ("base.yaml", "train.jsonl", "tower.json", "lm", "images"):
        if (here / name).exists() and name in ("lm", "images"):
            (tmp_path / name).symlink_to(here / name)
        elif (here / name).exists():
            (tmp_path / name).write_bytes((here / name).read_bytes())
    for path in here.glob("*.png"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(result) -> str:
    return " ".join(result.stderr.split())


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "train.jsonl"], "no folder is named for them. Add --output OUT"),
        (["--output", "out"], "no records are given. Add --data SOURCE"),
        (["--budget", "10"], "--budget is of a training, and no records are given. Add --data SOURCE"),
        (["--eval-data", "train.jsonl"], "--eval-data is of a training"),
        (["--data", "train.jsonl", "--output", "out", "--budget", "1"], "Add --eval-data FILE"),
        (["--data", "train.jsonl", "--output", "out", "--eval-data", "train.jsonl"], "Add --budget 10m"),
        ([*TRAIN, "--output", "out", "--max-steps", "3"], "--budget and --max-steps both say how long"),
        ([*TRAIN, "--output", "out", "--best", "loss"], "--best would choose weights by the questions"),
        ([*TRAIN, "--output", "out", "--seed", "3"], "Give --seeds N,N"),
        ([*TRAIN, "--output", "out", "--seeds", "1,1"], "--seeds names 1 twice"),
        ([*TRAIN, "--output", "out", "--seeds", "0,0"], "--seeds names 0 twice"),
        ([*TRAIN, "--output", "out", "--seeds", "a"], "--seeds expects whole numbers"),
        ([*TRAIN, "--output", "out", "--engine", "rey"], "--engine knows local and ray"),
        ([*TRAIN, "--output", "out", "--job-gpus", "1"], "--job-gpus has no effect without --engine ray"),
        ([*TRAIN, "--output", "out", "--metric", "exakt"], "Did you mean 'exact'?"),
        ([*TRAIN, "--output", "nowhere/out"], "does not exist"),
        ([*TRAIN, "--output", "lm"], "no sweep wrote it"),
        (["--data", "/dev/stdin", *TRAIN[2:], "--output", "out"], "is a pipe, which only one run could read"),
        (["--data", "nothing.jsonl", *TRAIN[2:], "--output", "out"], "cannot find the records 'nothing.jsonl'"),
    ],
)
def test_a_training_that_cannot_be(own, vlm, words, message):
    result = vlm("sweep", "base.yaml", *SETS, *words)
    assert result.exit_code in (1, 2)
    assert message in told(result)
    assert not (own / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"base": "base.yaml", "sets": {}}, "Did you mean 'set'?"),
        ({"base": "base.yaml", "seed": 1}, "unknown key 'seed'. Give seeds."),
        ({"base": "base.yaml", "seeds": "many"}, "seeds must be a whole number"),
        ({"base": "base.yaml", "set": ["fusion"]}, "set must be a mapping"),
        ({"base": "base.yaml", "learning_rate": "fast"}, "learning_rate must be a number"),
        ({"base": "base.yaml", "set": {"fusion": []}}, "gives 0 values"),
        ({"base": "base.yaml", "set": {"fusion": ["a", "a"]}}, "names the value 'a' twice"),
        ({"base": "base.yaml", "budget": "soon"}, "--budget expects time"),
        ({"set": {"fusion": "language-stream"}}, "no BASE is given"),
        ({"base": {"vision_encoder": "tower.json", "fusions": "x"}}, "Did you mean 'fusion'?"),
    ],
)
def test_a_file_that_is_no_sweep(own, vlm, data, message):
    (own / "sweep.yaml").write_text(yaml.safe_dump(data))
    result = vlm("sweep", "sweep.yaml")
    assert result.exit_code == 2
    assert message in told(result)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "10x", "m", "", "1e400m", "0s", "9" * 13])
def test_a_budget_that_is_none(text):
    with pytest.raises(UsageError, match="--budget expects time"):
        Budget.parse(text)


@pytest.mark.matrix
def test_one_run_fails_and_the_others_go_on(own, vlm, monkeypatch):
    def break_mlp(words: Sequence[str]) -> int | None:
        if words[0] != "train" or "mlp" not in words[1]:
            return None
        (Path(words[1]).parent / "log.txt").write_text("step 1\nError: the loss is nan at step 1,\nin the records x.\n")
        return 1

    ran = launch_here(monkeypatch, break_mlp, pretends=True)
    words = ["sweep", "base.yaml", *SETS, *TRAIN, "--output", "out"]
    result = vlm(*words)
    assert result.exit_code == 1
    assert "1 of 2 runs failed: mlp, seed 0: vlm train failed: the loss is nan at step 1, in the records x." in told(
        result
    )
    rows = json.loads((own / "out/results.json").read_text())["compositions"]
    assert "scores" in rows[0]
    assert rows[1]["runs"][0]["problem"] == "vlm train failed: the loss is nan at step 1, in the records x."
    assert "the loss is nan at step 1" in (own / "out/results.html").read_text()
    assert "the loss is nan at step 1" in (own / "out/results.md").read_text()
    ran = launch_here(monkeypatch, pretends=True)
    result = vlm(*words)
    assert result.exit_code == 0
    assert [x[0] for x in ran] == ["train", "eval"]  # what was built is kept


@pytest.mark.matrix
def test_a_run_that_is_killed(own, vlm, monkeypatch):
    launch_here(monkeypatch, lambda words: -9 if words[0] == "train" else None, pretends=True)
    result = vlm("sweep", "base.yaml", *TRAIN, "--output", "out")
    assert result.exit_code == 1
    assert "vlm train failed: signal 9 ended it, as when memory runs out" in told(result)


@pytest.mark.matrix
def test_a_full_disk_ends_the_sweep_and_it_goes_on(own, vlm, monkeypatch):
    def fill(words: Sequence[str]) -> int | None:
        if words[0] != "train":
            return None
        (Path(words[1]).parent / "log.txt").write_text(f"Error: cannot write 'x': {os.strerror(errno.ENOSPC)}.\n")
        return 1

    ran = launch_here(monkeypatch, fill, pretends=True)
    words = ["sweep", "base.yaml", *SETS, *TRAIN, "--output", "out"]
    result = vlm(*words)
    assert result.exit_code == 1
    assert "the disk of 'out' is full" in told(result)
    assert "Make room, then give the same command again" in told(result)
    assert [x[0] for x in ran] == ["build", "train"]  # the second run does not begin
    launch_here(monkeypatch, pretends=True)
    assert vlm(*words).exit_code == 0


@pytest.mark.matrix
def test_results_that_a_full_disk_does_not_hold(own, vlm, monkeypatch):
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    launch_here(monkeypatch, pretends=True)
    monkeypatch.setattr("os.fsync", fail)
    result = vlm("sweep", "base.yaml", *TRAIN, "--output", "out")
    assert result.exit_code == 1
    assert "No space left on device" in told(result)
    monkeypatch.undo()
    monkeypatch.chdir(own)
    launch_here(monkeypatch, pretends=True)
    assert vlm("sweep", "base.yaml", *TRAIN, "--output", "out").exit_code == 0


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["train.jsonl", "tower.json"])
def test_inputs_that_change_are_refused(own, vlm, monkeypatch, name):
    ran = launch_here(monkeypatch, pretends=True)
    words = ["sweep", "base.yaml", *TRAIN, "--output", "out"]
    assert vlm(*words).exit_code == 0
    before = (own / "out/results.json").read_bytes()
    text = (own / name).read_text()
    (own / name).write_text(text + "\n" if name == "tower.json" else text + text.splitlines()[0] + "\n")
    ran.clear()
    result = vlm(*words)
    assert result.exit_code == 2
    assert f"what they read has changed since: {name} Bring it back" in told(result)
    assert ran == []
    assert (own / "out/results.json").read_bytes() == before
    assert vlm(*words, "--overwrite").exit_code == 0
    assert [x[0] for x in ran] == ["build", "train", "eval"]


def test_another_sweep_writes_there(own, vlm):
    with locked(own / "out"):
        from threading import Thread

        found = []
        thread = Thread(target=lambda: found.append(vlm("sweep", "base.yaml", *TRAIN, "--output", "out")))
        thread.start()
        thread.join()
    assert found[0].exit_code == 2
    assert "another thread of this process" in told(found[0])


@pytest.mark.matrix
def test_answers_to_other_questions(own, vlm, monkeypatch):
    launch_here(monkeypatch, pretends=True)
    words = ["sweep", "base.yaml", *TRAIN, "--output", "out"]
    assert vlm(*words).exit_code == 0
    [answers] = (own / "out").rglob("answers-*.jsonl")
    answers.write_text(answers.read_text().splitlines()[0] + "\n")
    result = vlm(*words)
    assert result.exit_code == 1
    assert "does not hold the answers to these questions. Delete it" in told(result)
    answers.unlink()
    assert vlm(*words).exit_code == 0


@pytest.mark.matrix
def test_another_version_is_told(own, vlm, monkeypatch):
    launch_here(monkeypatch, pretends=True)
    words = ["sweep", "base.yaml", *TRAIN, "--output", "out"]
    assert vlm(*words).exit_code == 0
    values = yaml.safe_load((own / "out/sweep.yaml").read_text())
    values["made_with"]["versions"]["torch"] = "1.0"
    (own / "out/sweep.yaml").write_text(yaml.safe_dump(values))
    result = vlm(*words)
    assert result.exit_code == 0
    assert "the sweep was made with 1.0." in told(result)
