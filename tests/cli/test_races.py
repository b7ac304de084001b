"""Two commands that write the same output, and outputs that appear while a command works."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm_cli
from tests.support.holder import Holder
from vlm_cli import files

COMMANDS = ("build", "export", "train", "eval", "batch")


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Transformers and Accelerate write into the environment when they train."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output, in a folder of its own, so that litter is seen."""
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "out"


@pytest.fixture
def words(parts: Any, flamingo: Path, tmp_path: Path, out: Path) -> Callable[[str], list[str]]:
    """The words of a command that writes `out`."""
    Image.new("RGB", (40, 30)).save(tmp_path / "black.png")
    record = {"prompt": "<image:black.png>The cat", "completion": " sits"}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(record) + "\n")
    lines = {
        "build": ["build", out, *parts.flamingo, "--random-weights"],
        "export": ["export", flamingo, out, "--format", "language-model"],
        "train": ["train", flamingo, "--data", data, "--output", out, "--max-steps", 1, "--device", "cpu"],
        "eval": ["eval", flamingo, "--data", data, "--output", out, "-n", 2],
        "batch": ["batch", data, "--model", flamingo, "--output", out, "-n", 2, "--workers", 0],
    }
    return lambda command: [str(word) for word in lines[command]]


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", COMMANDS[:-1])  # the journal of a batch has a lock of its own
def test_the_second_command_is_refused_before_it_loads_a_model(vlm, words, out, monkeypatch, command):
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model is loaded")

    for name in ("training.trainable.load", "checkpoint.building.create", "checkpoint.directory.load"):
        monkeypatch.setattr(f"vlm_cli.{name}", load)
    holder = Holder(out)
    result = vlm(*words(command))
    holder.end()
    assert result.exit_code == 2, result.stderr
    assert f"is being written by another vlm, process {holder.process.pid} on " in result.stderr
    assert os.listdir(out.parent) == []
    assert "a model is loaded" in vlm(*words(command)).stderr  # the twin: the lock alone stopped it
    assert os.listdir(out.parent) == []


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_appears_at_the_last_moment_stays(vlm, words, out, monkeypatch, command):
    def appear(name: str) -> None:
        original = getattr(files, name)

        def late(*args: Any) -> None:
            if command in ("eval", "batch"):
                out.write_text("somebody's")
            else:
                out.mkdir()
                (out / "letters.txt").write_text("somebody's")
            original(*args)

        monkeypatch.setattr(files, name, late)

    appear("_put_files" if command in ("eval", "batch") else "_put_directory")
    result = vlm(*words(command))
    assert result.exit_code == (1 if command == "train" else 2), result.stderr
    assert "appeared while vlm was working, and stays as it is" in result.stderr and "Wrote" not in result.stderr
    assert (out / "letters.txt" if out.is_dir() else out).read_text() == "somebody's"
    kept = {"train": ["out.checkpoints"], "batch": ["out.partial"]}.get(command, [])
    assert sorted(os.listdir(out.parent)) == ["out", *kept]


# -- real processes ---------------------------------------------------------------------------------------------------


def start(words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vlm_cli", *words]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.attack
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_of_two_real_commands_one_writes(environment, words, out, command, overwrite):
    if overwrite and command in ("build", "export"):
        assert start(words(command), environment).wait() == 0
    arguments = [*words(command), *(["--overwrite"] if overwrite else [])]
    both = [start(arguments, environment) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    codes = sorted(process.returncode for process in both)
    # With --overwrite, the second command may also begin after the first one has ended.
    assert codes == [0, 2] or (overwrite and codes == [0, 0]), errors
    assert "Traceback" not in "".join(errors) and "".join(errors).count("Wrote") == codes.count(0)
    assert os.listdir(out.parent) == ["out"]
    if command in ("build", "train"):
        vlm_cli.load(out)


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(8))
def test_a_folder_that_appears_during_a_real_build_stays(environment, words, out, seed):
    process = start(words("build"), environment)
    # The lock shows that the build has begun; what follows takes about a second.
    while not (out.parent / ".out.lock").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 1))
    is_late = out.exists()
    if not is_late:
        out.mkdir()
        (out / "letters.txt").write_text("somebody's")
    error = process.communicate()[1]
    assert process.returncode == (0 if is_late else 2), error
    assert is_late or (out / "letters.txt").read_text() == "somebody's"
    assert os.listdir(out.parent) == ["out"]
