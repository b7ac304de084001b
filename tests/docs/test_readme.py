"""The README is true: the tests run what it shows, and check that what it names exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import ROOT
from tests.support.markdown import blocks, flags, table
from tests.support.sessions import Step, agrees, run, run_python, steps
from vlm_cli.checkpoint.parts.vision_encoders import find_tower
from vlm_cli.cli.app import app
from vlm_cli.composition import FAMILIES, VisionEncoderOptions, split_name
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def command_under(title: str) -> str:
    """The first bash block under a title."""
    return blocks(README.partition(f"\n## {title}\n")[2], "bash")[0]


@contextmanager
def checkout(path: Path) -> Iterator[Path]:
    """Make a folder like a checkout, and work in it."""
    (path / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the README's commands run one after the other."""
    with checkout(tmp_path_factory.mktemp("checkout")) as path:
        yield path


def test_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_two_commands() -> None:
    first, second = command_under("Try it"), command_under("Check your installation")
    assert first.startswith("python3 -m venv .venv &&\n.venv/bin/pip install . &&\n.venv/bin/vlm generate ")
    assert second.startswith(".venv/bin/pip install '.[dev]' &&\n.venv/bin/pytest")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_first_command_says_what_it_prints(folder: Path) -> None:
    line = command_under("Try it").split("&&")[2]
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0 and f"It prints `{result.stdout.rstrip()}`" in README


def check_step(step: Step, line: str, *, shows_it: bool = True) -> None:
    code, printed = run(line)
    assert not shows_it or agrees(step.shown, printed), f"$ {line}\n{printed}"
    assert bool(code) == step.shown.startswith("Error:")


@pytest.mark.parametrize("step", steps(README), ids=lambda step: step.line[:60])
def test_session(folder: Path, step: Step) -> None:
    """A hundred steps of training take five seconds. Two do here, after which the answer is another."""
    line = step.line.replace("--max-steps 100", "--max-steps 2")
    check_step(step, line, shows_it=not line.startswith("vlm generate --model trained"))


@pytest.mark.matrix
def test_session_as_it_is_printed(tmp_path: Path) -> None:
    assert "--max-steps 100" in README and "vlm generate --model trained" in README
    with checkout(tmp_path):
        for step in steps(README):
            check_step(step, step.line)
        run_python(README, "README")


def test_python(folder: Path) -> None:
    """The demo stands for the trained model, which gives this answer too."""
    assert README.count('load("trained")') == 1
    run_python(README.replace('load("trained")', 'load("demo")'), "README")


def test_agrees_notices_a_difference() -> None:
    shown = "a 12\n…\nlast 0.4 s\n"
    assert agrees(shown, "a 12  \n\nb\nc\nlast 1.25 s\n")
    assert not agrees(shown, "a 13\nb\nlast 0.4 s\n")
    assert not agrees(shown, "a 12\nb\nlast 0.4 s\nmore\n")


def test_parts() -> None:
    cells = {name: text for name, text in table(README, "part")}
    for place, registry in (("vision tokenizer", VISION_TOKENIZERS), ("fusion", FUSIONS)):
        ours = [name for name in registry if registry[name].target.startswith("vlm_cli.")]
        assert [choice.partition(":")[0] for choice in cells[place].split("<br>")] == ours


def test_families_are_named() -> None:
    assert all(f"`{name}`" in README for name in FAMILIES)


def test_flags_exist() -> None:
    # Other programs have flags of their own.
    ours = re.sub(r"^(python -m|\.venv/bin/pytest) .*$", "", README, flags=re.MULTILINE)
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours))
    assert mentioned <= set().union(*flags().values()) | {"--help"}


def test_vision_encoders_exist() -> None:
    names = set(re.findall(r"\b(?:ViT|EVA01)-[\w-]+(?::\w+)?", README))
    names = {name for name in names if re.search(r"\d", name)}
    assert names
    for name in names:
        find_tower(VisionEncoderOptions(**split_name(name)))


def test_says_that_a_fresh_composition_is_untrained() -> None:
    assert "**A fresh composition is untrained.**" in README


def test_comparison_counts_what_compatibility_counts() -> None:
    measured = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    cells = {name: ours for name, ours, *_ in table(README, "")}
    counts = {"vision encoder": r"OpenCLIP towers, of (\d+)", "language model": r"types × fusions, of (\d+)"}
    for row, counted in counts.items():
        found = re.search(counted, measured)
        assert found and found[1] in re.findall(r"\d+", cells[row]), row
