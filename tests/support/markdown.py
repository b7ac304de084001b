"""How to read the documentation."""

from __future__ import annotations

import re
from typing import Any


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language in a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def table(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose first heading is `first`, without backticks."""
    head = rf"\n\| *`?{re.escape(first)}`? *\|"
    found = re.search(head, text)
    assert found, f"no table begins with {first!r}"
    rows = text[found.end() :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split(" | ")] for row in rows]


def flags() -> dict[str, set[str]]:
    """The options of each command of `vlm`, and their names in other programs."""
    import typer.main

    from vlm_cli.cli.app import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]

    def names(command: Any) -> set[str]:
        own = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}
        return own | {alias.name for alias in getattr(command.callback, "aliases", {})}

    return {name: names(command) for name, command in commands.items()}
