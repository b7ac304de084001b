"""Values for the grid of a sweep over tiny parts, and the commands of a sweep in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from vlm_cli.cli.app import app
from vlm_cli.cli.sweep_process import Launcher

PERCEIVER = "{type: perceiver, depth: 1, num_heads: 2, head_dim: 16, num_latents: 4}"
CROSS_ATTENTION = "{type: cross-attention, num_heads: 2, head_dim: 16, every: 2}"


def launch_here(
    monkeypatch: Any, before: Callable[[Sequence[str]], int | None] = lambda words: None
) -> list[list[str]]:
    """Let a sweep run its commands in this process, and return the list to which their words are added.

    Args:
        monkeypatch: pytest's.
        before: called with the words of a command; a number that it returns is the exit code of a command not run.
    """
    ran: list[list[str]] = []

    def launch(self: Launcher, words: Sequence[str], log: Path, printed: Path | None) -> int:
        ran.append(list(words))
        if (code := before(words)) is not None:
            return code
        result = CliRunner().invoke(app, list(words))
        with log.open("a", encoding="utf-8") as file:
            file.write(result.stderr)
        if printed is not None:
            printed.write_text(result.stdout, encoding="utf-8")
        return result.exit_code

    monkeypatch.setattr(Launcher, "__call__", launch)
    return ran
