"""Write docs/help.md: what `--help` prints, of `vlm` and of each command.

Example: python docs/generate_help.py
"""

from pathlib import Path

import typer.main
from typer.testing import CliRunner

from vlm_cli.cli.app import app

PAGE = Path(__file__).with_name("help.md")
COLUMNS = "100"  # characters of the terminal


def generate() -> str:
    """The page."""
    lines = ["# Help", "", "What `vlm --help` and `vlm COMMAND --help` print; written by `docs/generate_help.py`."]
    names = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in ([], *([name] for name in names)):
        title = " ".join(["vlm", *words])
        result = CliRunner().invoke(app, [*words, "--help"], prog_name="vlm", env={"COLUMNS": COLUMNS})
        lines += ["", f"## {title}", "", "```text", *(line.rstrip() for line in result.output.splitlines()), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(generate(), encoding="utf-8")
    print(f"Wrote {PAGE}.")
