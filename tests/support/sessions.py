"""How to run what a page of the documentation shows, and compare what it prints.

The commands of a page run in their order and in one folder. What they print is compared line by line with the page.
Trailing spaces and empty lines do not count, a line that is only `…` stands for any lines, and times, memory and the
device may differ.
"""

from __future__ import annotations

import doctest
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.command import vlm
from tests.support.markdown import blocks

__all__ = ["Step", "agrees", "run", "run_bash", "run_python", "steps"]

# What differs from run to run: `0.4 s`, `37.8 tokens/s`, `"seconds": 0.2`, `peak memory 919.9 MB`, `on cpu`, and
# differences of rounding: `differ by 3.9e-07`.
VARYING = re.compile(
    r'[\d.]+(?= s\b| tokens/s)|(?<=seconds": )[\d.]+|(?<=peak memory )[\d.]+ .?B|(?<= on )(?:cpu|cuda|mps)\b'
    r"|(?<=differ by )[\d.e+-]+"
)


@dataclass(frozen=True)
class Step:
    """A command of a console block, and the output that the page shows."""

    line: str
    shown: str


def steps(page: str) -> list[Step]:
    """The commands of all console blocks of a page, in their order."""
    found = []
    for block in blocks(page, "console"):
        parts = re.split(r"^\$ ((?:.*\\\n)*.*)\n", block, flags=re.MULTILINE)
        found += [Step(line, shown) for line, shown in zip(parts[1::2], parts[2::2], strict=True)]
    return found


def agrees(shown: str, printed: str) -> bool:
    """Say whether a command printed what the page shows."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in VARYING.sub("#", text).splitlines() if line.strip()]

    pattern = "".join(r"(?:.*\n)*" if line == "…" else re.escape(line) + "\n" for line in lines(shown))
    return re.fullmatch(pattern, "".join(line + "\n" for line in lines(printed))) is not None


def run(line: str) -> tuple[int, str]:
    """Run one shell line (`vlm …`, `python FILE …`, `cat FILE`, or `cat FILE | vlm …`) in this process.

    Returns:
        The exit code and what a terminal would show.
    """
    words = shlex.split(line.replace("\\\n", ""))
    stdin = b""
    if words[0] == "cat" and len(words) == 2:
        return 0, Path(words[1]).read_text(encoding="utf-8")
    if words[0] == "cat" and words[2] == "|":
        stdin, words = Path(words[1]).read_bytes(), words[3:]
    if words[0] == "python":
        printed = StringIO()
        with patch.object(sys, "argv", words[1:]), redirect_stdout(printed):
            runpy.run_path(words[1], run_name="__main__")
        return 0, printed.getvalue()
    assert words[0] == "vlm", line
    return vlm(words[1:], stdin)


def run_bash(block: str) -> None:
    """Run a bash block of commands that `&&` joins; each must succeed."""
    for line in block.replace("\\\n", "").split("&&"):
        code, printed = run(line.strip())
        assert code == 0, f"$ {line}\n{printed}"


def run_python(page: str, title: str) -> None:
    """Run the interactive Python of a page as one session."""
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner()
    for number, block in enumerate(blocks(page, "pycon")):
        test = doctest.DocTestParser().get_doctest(block, names, f"{title}, block {number}", None, 0)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
    assert runner.tries and not runner.failures, title
