"""What the shell sees: how fast it answers, `python -m vlm_cli`, completion, pipes and signals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import vlm_cli
from tests.support.grid import first_of
from vlm_cli.cli.app import app

COMMANDS = ("build", "inspect", "generate", "chat", "batch", "eval", "count-params", "list")
VLM = [sys.executable, "-m", "vlm_cli"]


@pytest.fixture
def shell(environment):
    def run(*command, **keywords):
        words = [*VLM, *command] if isinstance(command[0], str) else command[0]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, **keywords)

    return run


def test_version_and_help(shell):
    result = shell("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"vlm {vlm_cli.__version__}\n", "")
    text = shell("--help").stdout
    assert all(command in text for command in COMMANDS)


def test_help_and_lists_import_neither_torch_nor_transformers(environment):
    questions = [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS), ["list"]]
    questions += [["list", kind] for kind in ("families", "vision-encoders", "vision-tokenizers", "language-models")]
    questions += [["list", "--json"], ["list", "vision-encoders", "siglip", "--json"]]
    script = (
        "import sys, json\nfrom typer.testing import CliRunner\nfrom vlm_cli.cli.app import app\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    result = CliRunner().invoke(app, words)\n"
        "    assert result.exit_code == 0 and result.stdout, words\n"
        "    heavy = {'torch', 'transformers', 'open_clip', 'PIL', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
        "assert 'rich' in sys.modules\n"  # the twin: a table needs it
    )
    command = [sys.executable, "-c", script, json.dumps(questions)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_every_help_ends_with_a_line_to_paste(vlm):
    for command in COMMANDS:
        assert f"Example: vlm {command}" in " ".join(vlm(command, "--help").stdout.split())


def test_without_a_command_there_is_help(vlm):
    assert "Usage: vlm" in vlm().output


def test_an_unknown_command_and_option_are_wrong_usage(vlm):
    result = vlm("buld")
    assert result.exit_code == 2 and "build" in result.stderr
    result = vlm("list", "--jsn")
    assert result.exit_code == 2 and "--json" in result.stderr


@pytest.mark.parametrize("shell_name", first_of(["bash", "zsh", "fish"]))
def test_completion_is_shown(shell, environment, shell_name):
    environment = environment | {"SHELL": f"/bin/{shell_name}", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [*VLM, "--show-completion", shell_name]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "vlm" in result.stdout.lower() and "_complete" in result.stdout.lower()


@pytest.mark.matrix
def test_completion_is_installed_and_completes(environment):
    vlm = Path(sys.executable).with_name("vlm")
    environment = environment | {"SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    result = subprocess.run([vlm, "--install-completion", "bash"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list(Path(environment["HOME"]).rglob("*vlm*"))
    asked = environment | {"_VLM_COMPLETE": "complete_bash", "COMP_WORDS": "vlm cou", "COMP_CWORD": "1"}
    result = subprocess.run([vlm], env=asked, capture_output=True, text=True)
    assert result.stdout.strip() == "count-params"


@pytest.mark.matrix
def test_a_reader_that_has_seen_enough(environment):
    vlm = " ".join(VLM)
    command = ["bash", "-c", f"{vlm} list vision-encoders | head -n 1; {vlm} list | true"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.count("\n") == 1 and result.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.matrix
def test_output_that_cannot_be_written(shell):
    result = shell(["bash", "-c", " ".join([*VLM, "list", ">/dev/full"])])
    assert result.returncode == 1
    assert "No space left on device" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))  # type: ignore[attr-defined]
def test_help_fits_80_columns(command: str) -> None:
    lines = CliRunner().invoke(app, [command, "--help"], terminal_width=80).output.splitlines()
    assert len(lines) > 10 and [line for line in lines if len(line) > 80] == []
