"""Draw docs/images/session-light.svg and session-dark.svg: a terminal in which vlm's commands really ran.

The script runs the commands in `COMMANDS`, records what a terminal would show, and rich draws it. Messages on stderr
are grey. None of the commands prints a time, so the drawing is the same each time.

Example: python docs/generate_session.py
"""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text
from typer.testing import CliRunner

from vlm_cli.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
COLUMNS = 96  # characters of the terminal
COMMANDS = (
    'vlm generate "<image:examples/images/two.png>Describe the image."',
    "cat examples/turns.txt",
    "cat examples/turns.txt | vlm chat",
    'vlm inspect demo --prompt "<image:one.png>A cross. <image:two.png>How many things are there?"',
)
GREYS = [(110, 119, 129)] * 8
#: GitHub's colours of the background, the text, and the palette, of which only the greys and green (2) are used.
THEMES = {
    "light": TerminalTheme((246, 248, 250), (31, 35, 40), [*GREYS[:2], (26, 127, 55), *GREYS[3:]]),
    "dark": TerminalTheme((22, 27, 34), (230, 237, 243), [*GREYS[:2], (63, 185, 80), *GREYS[3:]]),
}


def record() -> Iterator[Text]:
    """Run the commands in this process, and yield the lines of the terminal."""
    for command in COMMANDS:
        yield Text.assemble(("$ ", "green"), (command, "bold"))
        words, stdin = shlex.split(command), b""
        if words[0] == "cat":
            stdin = (ROOT / words[1]).read_bytes()
            words = words[3:]
        if not words:
            yield from map(Text, stdin.decode().splitlines())
            continue
        result = CliRunner().invoke(app, words[1:], input=stdin, env={"COLUMNS": str(COLUMNS)})
        assert result.exit_code == 0, result.output
        messages = set(result.stderr.splitlines())
        for line in result.output.strip("\n").splitlines():
            yield Text(line, style="white" if line in messages else "")


def draw(lines: list[Text], theme: TerminalTheme) -> str:
    """Draw the lines as an SVG that needs no font from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="standard")
    for line in lines:
        console.print(line, soft_wrap=False, no_wrap=True, overflow="crop", highlight=False)
    svg = console.export_svg(title="vlm", theme=theme, unique_id="session")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas")
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def generate() -> dict[Path, str]:
    """Run the commands once and draw them in each theme."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        lines = list(record())
    finally:
        os.chdir(before)
    return {IMAGES / f"session-{name}.svg": draw(lines, theme) for name, theme in THEMES.items()}


if __name__ == "__main__":
    for path, svg in generate().items():
        path.write_text(svg, encoding="utf-8")
        print(f"Wrote {path}.")
