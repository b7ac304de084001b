"""The README is true: what it shows is run, in its order and in one folder, and what it names exists.

What a run prints is compared line by line with what the README shows. Trailing spaces and empty lines do not count,
a line that is only `…` stands for any lines, and times, memory and the device for any.
"""

from __future__ import annotations

import doctest
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from tests.support import ROOT
from tests.support.command import vlm
from tests.support.markdown import blocks
from vlm_cli.checkpoint.parts.openclip import find_tower
from vlm_cli.cli.app import app
from vlm_cli.composition import FAMILIES, PARTS, VisionEncoderOptions, split_name
from vlm_cli.registry import FUSIONS, VISION_TOKENIZERS

README = (ROOT / "README.md").read_text(encoding="utf-8")

# What differs from run to run: `0.4 s`, `37.8 tokens/s`, `"seconds": 0.2`, `peak memory 919.9 MB`, `on cpu`.
VARYING = re.compile(
    r'[\d.]+(?= s\b| tokens/s)|(?<=seconds": )[\d.]+|(?<=peak memory )[\d.]+ .?B|(?<= on )(?:cpu|cuda|mps)\b'
)


def steps(block: str) -> list[tuple[str, str]]:
    """Commands of a console block, and what each prints."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def agrees(shown: str, printed: str) -> bool:
    """Whether `printed` is what the README shows."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in VARYING.sub("#", text).splitlines() if line.strip()]

    pattern = "".join(r"(?:.*\n)*" if line == "…" else re.escape(line) + "\n" for line in lines(shown))
    return re.fullmatch(pattern, "".join(line + "\n" for line in lines(printed))) is not None


def run(line: str) -> tuple[int, str]:
    """One shell line: `vlm …`, `cat FILE`, or `cat FILE | vlm …`."""
    words = shlex.split(line)
    stdin = b""
    if words[0] == "cat" and len(words) == 2:
        return 0, Path(words[1]).read_text(encoding="utf-8")
    if words[0] == "cat" and words[2] == "|":
        stdin, words = Path(words[1]).read_bytes(), words[3:]
    assert words[0] == "vlm", line
    return vlm(words[1:], stdin)


def two_commands() -> list[str]:
    return blocks(README.partition("\n## Two commands\n")[2], "bash")[:2]


def composing() -> list[str]:
    """The command that composes a VLM on the spot, as words of its programs."""
    block = blocks(README.partition("\n## What it looks like\n")[2], "bash")[0]
    return block.replace("\\\n", "").split("&&")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a VLM was composed."""
    path = tmp_path_factory.mktemp("checkout")
    (path / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for line in composing():
            program, *words = shlex.split(line)
            if program == "python":
                patch.setattr(sys, "argv", words)
                runpy.run_path(words[0], run_name="__main__")
            else:
                code, printed = vlm(words)
                assert program == "vlm" and code == 0, printed
        yield path


def test_two_commands() -> None:
    first, second = two_commands()
    assert first.startswith("python3 -m venv .venv &&\n.venv/bin/pip install '.[dev]' &&\n")
    assert second == ".venv/bin/pytest -n 2 --dist loadfile\n"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_first_command_says_what_it_prints(folder: Path) -> None:
    line = two_commands()[0].split("&&")[2]
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0 and f"It prints `{result.stdout.rstrip()}`" in README


def test_composing_can_run_again(folder: Path) -> None:
    assert vlm(shlex.split(composing()[1])[1:])[0] == 0


@pytest.mark.parametrize("block", blocks(README, "console"))
def test_session(folder: Path, block: str) -> None:
    for line, shown in steps(block):
        code, printed = run(line)
        assert agrees(shown, printed), f"$ {line}\n{printed}"
        assert bool(code) == shown.startswith("Error:")


def test_agrees_notices_a_difference() -> None:
    shown = "a 12\n…\nlast 0.4 s\n"
    assert agrees(shown, "a 12  \n\nb\nc\nlast 1.25 s\n")
    assert not agrees(shown, "a 13\nb\nlast 0.4 s\n")
    assert not agrees(shown, "a 12\nb\nlast 0.4 s\nmore\n")


def test_python(folder: Path) -> None:
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner()
    for number, block in enumerate(blocks(README, "pycon")):
        test = doctest.DocTestParser().get_doctest(block, names, f"README, block {number}", None, 0)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
    assert runner.summarize(verbose=False) == doctest.TestResults(0, runner.tries)
    assert runner.tries


def test_parts() -> None:
    cells = {name: text for name, text in table("part")}
    for place, registry in (("vision tokenizer", VISION_TOKENIZERS), ("fusion", FUSIONS)):
        ours = [name for name in registry if registry[name].target.startswith("vlm_cli.")]
        assert [choice.partition(":")[0] for choice in cells[place].split("<br>")] == ours


def table(first: str) -> list[list[str]]:
    """Cells of the table whose first heading is `first`, without backticks."""
    rows = README.partition(f"\n| {first} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split(" | ")] for row in rows]


def test_families() -> None:
    rows = {name.strip(): cells for name, *cells in table("family")}
    assert list(rows) == list(FAMILIES)
    for name, (tokenizer, fusion, trains, decay, encoder, language_model) in rows.items():
        preset = FAMILIES[name]
        assert (tokenizer, fusion) == (preset["vision_tokenizer"]["type"], preset["fusion"]["type"])
        assert encoder == "{name}:{pretrained}".format(**preset["vision_encoder"])
        assert language_model == preset["language_model"]["name"]
        only = ", fusion only" if preset.get("weight_decay_on") == ["fusion"] else ""
        assert decay == f"{preset['weight_decay']:g}{only}"
        parts = {"tokenizer": "vision_tokenizer", "fusion": "fusion", "added tokens": "added_tokens"}
        all_but = set(PARTS) - {"vision_encoder"}
        told = all_but if trains == "all but the vision encoder" else {parts[x] for x in trains.split(", ")}
        assert told == set(preset["trainable"])


def flags() -> dict[str, set[str]]:
    """The options of each command."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: {flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}
        for name, command in commands.items()
    }


def test_commands() -> None:
    known = flags()
    rows = {re.findall(r"vlm (\S+)", name)[0]: worth for name, _, worth in table("command")}
    assert list(rows) == list(known)
    for name, worth in rows.items():
        assert set(re.findall(r"--[a-z-]+", worth)) <= known[name], name


def test_flags_exist() -> None:
    # Other programs have flags of their own.
    ours = re.sub(r"^(python -m|\.venv/bin/pytest) .*$", "", README, flags=re.MULTILINE)
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours))
    assert mentioned <= set().union(*flags().values()) | {"--help"}


def test_vision_encoders_exist() -> None:
    names = set(re.findall(r"\b(?:ViT|EVA01)-[\w-]+(?::\w+)?", README)) - {"ViT-B-23"}
    assert names
    for name in names:
        find_tower(VisionEncoderOptions(**split_name(name)))


def test_says_that_a_fresh_composition_is_untrained() -> None:
    assert "**A fresh composition is untrained.**" in README
