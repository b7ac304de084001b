"""`examples/plugin`, installed into an environment of its own and used from the command line."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlm_cli
from tests.support import ROOT
from tests.support.command import run_in_copy
from tests.support.packages import packages_in
from vlm_cli.cli.app import app

PLUGIN = ROOT / "examples" / "plugin"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment `env` that has what this one has and the plugin, and a language model `tiny-lm`."""
    folder = tmp_path_factory.mktemp("scratch")
    shutil.copytree(PLUGIN, folder / "plugin")  # a build leaves files beside its source
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    [packages] = (folder / "env").glob("lib/python*/site-packages")
    ours = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(vlm_cli.__file__).parents[1])]
    (packages / "ours.pth").write_text("".join(f"{path}\n" for path in dict.fromkeys(ours)))
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "--python", python(folder), "install", "--quiet", *offline, folder / "plugin"]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runpy.run_path(str(ROOT / "examples" / "tiny_language_model.py"))["make"](folder / "tiny-lm")
    return folder


def python(folder: Path) -> Path:
    return folder / "env" / "bin" / "python"


def run(folder: Path, *lines: str) -> str:
    """What the scratch environment prints for command lines of `vlm`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # Where the tests themselves were pointed at a working tree, the scratch environment is on its own.
    environment.pop("PYTHONPATH", None)
    printed = ""
    for line in lines:
        words = [python(folder), "-m", "vlm_cli", *line.split()]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        printed += done.stdout
    return printed


def run_in_copy_with_packages(folder: Path, *lines: str) -> str:
    """What a copy of this process prints for the same lines, with the packages of the scratch environment."""
    [packages] = (folder / "env").glob("lib/python*/site-packages")

    def work() -> None:
        with packages_in(packages):
            for line in lines:
                app(line.split(), standalone_mode=False)

    done = run_in_copy(work, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=[run_in_copy_with_packages, pytest.param(run, marks=pytest.mark.matrix)])
def printed(scratch: Path, request: pytest.FixtureRequest) -> str:
    """What the commands print that build a model `built` of all three parts of the plugin, show it and ask it."""
    parts = "--vision-encoder conv-patches --vision-tokenizer grid-pooling --fusion running-mean"
    own = "--set vision_encoder.depth=1 --set vision_encoder.image_size=64 --set vision_tokenizer.side=3"
    build = f"build built {parts} {own} --language-model tiny-lm --quiet --overwrite"
    picture = ROOT / "examples" / "images" / "cat.jpg"
    ask = f"generate --model built --image {picture} --json -n 4 Look"
    lines = (build, "list vision-encoders conv-patches", "inspect built", "count-params built --markdown", ask)
    return request.param(scratch, *lines)


def test_installed_parts_are_listed(scratch: Path) -> None:
    printed = run(scratch, "list")
    assert re.search(r"^ *grid-pooling +averages the grid", printed, re.MULTILINE)
    assert re.search(r"^ *running-mean +adds the mean", printed, re.MULTILINE)


def test_an_installed_model_is_shown_and_counted_and_answers(printed: str) -> None:
    assert re.search(r"^ *conv-patches\b", printed, re.MULTILINE)
    assert re.search(r"conv-patches \(ConvPatches.*\n.*grid-pooling \(side=3\)\n.*running-mean", printed)
    assert re.search(r"vision_x +\(B, T_img, F, 3, 64, 64\)\n +features +\(B, T_img, F, 16, 64\)\n", printed)
    assert re.search(r"media_gate +\+0\.0000", printed)
    assert "| fusion | 4,161 |" in printed
    assert json.loads(printed[printed.index("\n{") :])["text"]


@pytest.mark.usefixtures("printed")
def test_without_the_package_the_message_names_what_is_missing(scratch: Path) -> None:
    built = scratch / "built"
    result = CliRunner().invoke(app, ["inspect", str(built)])
    assert result.exit_code == 1
    assert (
        "lacks what it was built with: vision encoder 'conv-patches', vision tokenizer 'grid-pooling', fusion "
        "'running-mean'. Install the package that provides it" in result.stderr
    )
    config = built / "composition.yaml"
    result = CliRunner().invoke(app, ["build", str(built.parent / "again"), "--config", str(config)])
    assert result.exit_code == 2
    assert "unknown vision encoder 'conv-patches'" in result.stderr and "install the package" in result.stderr
    assert "unknown fusion 'running-mean'" in result.stderr
