"""docs/extending.md is true: its packages are written, found and run as if they were installed."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.markdown import blocks
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


def run_python(code: str, path: Path, *arguments: str) -> str:
    """What a fresh interpreter prints, where it finds what lies in `path`."""
    found = os.pathsep.join([str(path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=path, env={**os.environ, "PYTHONPATH": found}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_outside_parts_compose_and_run(packages: Path) -> None:
    runpy.run_path(str(ROOT / "examples" / "tiny_language_model.py"))["make"](packages / "tiny-lm")
    session = "".join(blocks(EXTENDING, "pycon"))
    assert session.count(">>>") > 10
    code = """
import doctest, sys
test = doctest.DocTestParser().get_doctest(sys.argv[1], {}, "extending.md", None, 0)
runner = doctest.DocTestRunner()
runner.run(test)
sys.exit(runner.failures)
"""
    run_python(code, packages, session)


def test_outside_parts_are_listed_without_torch(packages: Path) -> None:
    code = """
import sys
from vlm_cli.cli.app import app
from typer.testing import CliRunner
print(CliRunner().invoke(app, ["list"]).output)
assert "torch" not in sys.modules
"""
    printed = run_python(code, packages)
    assert "averages of neighbouring patches" in printed and "one token per medium" in printed


def test_python_of_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(composition.FAMILIES, "llava-1.5", {})  # removed after the test
    ran = [block for block in blocks(EXTENDING, "python") if not block.startswith("# ")]
    for block in ran:
        exec(compile(block, "extending.md", "exec"), {})
    assert len(ran) == 1 and composition.FAMILIES["llava-1.5"]
