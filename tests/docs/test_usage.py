"""docs/usage.md is true: the tests run what it shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.markdown import blocks, flags, table
from tests.support.sessions import Step, agrees, run, run_bash, run_python, steps
from vlm_cli.cli.export import FORMATS

PAGE = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
#: The command that takes 40 minutes.
LONG = "python -m examples.scenes.train"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like a checkout, in which the page composed its model."""
    path = tmp_path_factory.mktemp("usage")
    (path / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for block in blocks(PAGE, "bash"):
            if not block.startswith(LONG):
                run_bash(block)
        yield path


@pytest.mark.parametrize("step", steps(PAGE), ids=lambda step: step.line[:60])
def test_session(folder: Path, step: Step) -> None:
    code, printed = run(step.line)
    assert agrees(step.shown, printed), f"$ {step.line}\n{printed}"
    assert bool(code) == step.shown.startswith("Error:")


@pytest.mark.matrix
def test_composing_can_run_again(folder: Path) -> None:
    run_bash(blocks(PAGE, "bash")[0])


def test_python(folder: Path) -> None:
    run_python(PAGE, "usage.md")


def test_commands() -> None:
    known = flags()
    rows = {re.findall(r"vlm (\S+)", name)[0]: worth for name, _, worth in table(PAGE, "command")}
    assert set(rows) == set(known)
    for name, worth in rows.items():
        assert set(re.findall(r"--[a-z-]+", worth)) <= known[name], name


def test_flags_exist() -> None:
    ours = re.sub(rf"^{re.escape(LONG)}.*$", "", PAGE, flags=re.MULTILINE)
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", ours))
    assert mentioned <= set().union(*flags().values()) | {"--help", "--debug", "--install-completion"}


def test_export_formats() -> None:
    assert {name for name, _ in table(PAGE, "--format")} == set(FORMATS)
