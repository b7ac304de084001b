"""Small files that stand for much: `vlm` in a process of its own refuses them soon, and without filling the memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hardening.subjects import Workshop
from tests.support import ROOT

MAX_SECONDS = 20.0  # of computing, beside what the same command computes for whole files
MAX_BYTES = 1 << 30  # of memory, likewise


@dataclass(frozen=True)
class Spent:
    """What a process used, as the system counted it."""

    code: int
    seconds: float
    bytes: int
    stderr: str

    def problems(self, honest: Spent) -> list[str]:
        seconds, memory = self.seconds - honest.seconds, self.bytes - honest.bytes
        found = [f"{seconds:.1f} s more"] if seconds > MAX_SECONDS else []
        return found + ([f"{memory / 2**20:.0f} MB more"] if memory > MAX_BYTES else [])


#: A small process starts the program. Linux counts the memory that a process had before it became the program, which is
#: that of its parent, and the process of the tests may hold gigabytes.
_LAUNCHER = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""


def measured(program: list[str], folder: Path) -> Spent:
    """Run a program of Python to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, sys.executable, *program]
    done = subprocess.run(launcher, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return Spent(*json.loads(done.stdout), done.stderr)


def edited(**changes: Any) -> Callable[[Path], None]:
    """A change of keys in the part of config.json that describes the language model."""

    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        config["text_config"].update(changes)
        _replace(model / "config.json", json.dumps(config))

    return change


def _replace(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text)


def deep(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["composition"]["vision_tokenizer"]["depth"] = 2**31
    _replace(model / "config.json", json.dumps(config))


def doubling(model: Path) -> None:
    data = json.loads((model / "tokenizer.json").read_text())
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    data["normalizer"] = {"type": "Sequence", "normalizers": [step] * 40}
    _replace(model / "tokenizer.json", json.dumps(data))


BOMBS: dict[str, Callable[[Path], None]] = {
    "layers": edited(num_hidden_layers=10**9),
    "width": edited(hidden_size=2**30),
    "vocabulary": edited(vocab_size=10**12),
    "depth": deep,
    "brackets": lambda model: _replace(model / "config.json", "[" * 10_000_000),
    "a large file": lambda model: _replace(model / "config.json", '{"a": "' + "x" * 100_000_000 + '"}'),
    "tokenizer": doubling,
}
ALIASES = "".join(f"k{i + 1}: &k{i + 1} [{', '.join([f'*k{i}'] * 9)}]\n" for i in range(12))
COMPOSITIONS = {"aliases": "k0: &k0 [x]\n" + ALIASES, "a large composition": "family: llava # " + "x" * 100_000_000}


@pytest.fixture(scope="module")
def honest(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Spent:
    spent = measured(generate(shop.folder / "model"), tmp_path_factory.mktemp("honest"))
    assert spent.code == 0, spent.stderr
    return spent


def generate(model: Path) -> list[str]:
    return ["-m", "vlm_cli", "generate", "aaaa", "-m", str(model), "-n", "2"]


@pytest.mark.attack
@pytest.mark.parametrize("name", BOMBS)
def test_a_model_that_stands_for_much(name: str, shop: Workshop, honest: Spent, tmp_path: Path) -> None:
    model = Path(shutil.copytree(shop.folder / "model", tmp_path / "model"))
    BOMBS[name](model)
    spent = measured(generate(model), tmp_path)
    assert spent.code == 1 and spent.stderr.count("Error:") == 1 and not spent.problems(honest), spent


@pytest.mark.attack
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_that_stands_for_much(name: str, honest: Spent, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(COMPOSITIONS[name])
    spent = measured(["-m", "vlm_cli", "build", "out", "--config", "c.yaml"], tmp_path)
    assert spent.code == 2 and spent.stderr.count("Error:") == 1 and not spent.problems(honest), spent


@pytest.mark.attack
@pytest.mark.parametrize(
    ("program", "found"),
    [("bytearray(1 << 20)", ""), ("bytes(range(256)) * (5 << 20)", "MB more"), ("while True: pass", "s more")],
)
def test_what_a_process_uses_is_measured(
    program: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if found == "s more":
        monkeypatch.setattr(sys.modules[__name__], "MAX_SECONDS", 0.2)
        program = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\n" + program
    held = b"x" * (MAX_BYTES + (64 << 20))  # by the process of the tests, which the program must not be charged for
    problems = measured(["-c", program], tmp_path).problems(Spent(0, 0.0, 0, ""))
    del held
    assert [problem for problem in problems if problem.endswith(found)] == problems and bool(problems) == bool(found)
