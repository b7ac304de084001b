"""docs/extending.md is true: its packages are written, found and run as if they were installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import tiny_language_model
from tests.support import ROOT
from tests.support.markdown import blocks
from tests.support.packages import packages_in
from tests.support.sessions import run_python
from vlm_cli import composition

EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of the examples, as if they were installed: each block whose first line names its file."""
    folder = tmp_path_factory.mktemp("packages")
    for block in blocks(EXTENDING, "python"):
        if found := re.match(r"# (\w+/\w+\.py)\n", block):
            file = folder / found[1]
            file.parent.mkdir(exist_ok=True)
            file.write_text(block, encoding="utf-8")
    for number, block in enumerate(blocks(EXTENDING, "toml")):
        info = folder / f"package{number}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: package{number}\nVersion: 1\n")
        [(group, name, target)] = re.findall(r'\[project\.entry-points\."(.+)"\]\n(.+) = "(.+)"', block)
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    return folder


@pytest.mark.matrix
def test_outside_parts_compose_and_run(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_language_model.make(packages / "tiny-lm")
    assert EXTENDING.count(">>>") > 10
    monkeypatch.chdir(packages)
    with packages_in(packages):
        run_python(EXTENDING, "extending.md")


def test_outside_parts_are_listed_without_torch(packages: Path) -> None:
    """In a new interpreter, which has imported nothing."""
    code = """
import sys
from vlm_cli.cli.app import app
from typer.testing import CliRunner
print(CliRunner().invoke(app, ["list"]).output)
assert "torch" not in sys.modules
"""
    found = os.pathsep.join([str(packages), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": found}
    done = subprocess.run(command, cwd=packages, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout
    assert "averages of neighbouring patches" in printed and "one token per medium" in printed


def test_python_of_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(composition.FAMILIES, "llava-1.5", {})  # removed after the test
    ran = [block for block in blocks(EXTENDING, "python") if not block.startswith("# ")]
    for block in ran:
        exec(compile(block, "extending.md", "exec"), {})
    assert len(ran) == 1 and composition.FAMILIES["llava-1.5"]
