"""Values for the grid of a sweep over tiny parts, and the commands of a sweep in this process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from vlm_cli.cli.app import app
from vlm_cli.cli.sweep_process import Launcher
from vlm_cli.evaluation.items import read_items
from vlm_cli.prompt import format
from vlm_cli.sweeps import conducting

PERCEIVER = "{type: perceiver, depth: 1, num_heads: 2, head_dim: 16, num_latents: 4}"
CROSS_ATTENTION = "{type: cross-attention, num_heads: 2, head_dim: 16, every: 2}"


def launch_here(
    monkeypatch: Any,
    before: Callable[[Sequence[str]], int | None] = lambda words: None,
    *,
    pretends: bool = False,
    counts: bool = False,
) -> list[list[str]]:
    """Let a sweep run its commands in this process, and return the list to which their words are added.

    Args:
        monkeypatch: pytest's.
        before: called with the words of a command; a number that it returns is the exit code of a command not run.
        pretends: write what the sweep looks for, and run nothing: every answer is right. Nor are operations counted,
            unless `counts` says so.
        counts: count the operations of training in any case.
    """
    ran: list[list[str]] = []

    def launch(self: Launcher, words: Sequence[str], log: Path, printed: Path | None) -> int:
        ran.append(list(words))
        if (code := before(words)) is not None:
            return code
        if pretends:
            pretend(words, printed)
            return 0
        result = CliRunner().invoke(app, list(words))
        with log.open("a", encoding="utf-8") as file:
            file.write(result.stderr)
        if printed is not None:
            printed.write_text(result.stdout, encoding="utf-8")
        return result.exit_code

    monkeypatch.setattr(Launcher, "__call__", launch)
    if pretends and not counts:
        monkeypatch.setattr(conducting, "with_training_costs", lambda overviews, *_, **__: overviews)
    return ran


def pretend(words: Sequence[str], printed: Path | None) -> None:
    """Write what a sweep looks for after a command."""
    command, first, *rest = words
    given = dict(itertools.pairwise(rest))
    if command == "eval":
        items, _ = read_items(Path(given["--data"]), int(given["--limit"]))
        rows = [{"id": x.id, "prompt": format(x.asked), "expected": x.expected, "answer": x.expected} for x in items]
        Path(given["--output"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert printed is not None
        printed.write_text("{}")
        return
    made = Path(given["--output"] if command == "train" else first)
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "vlm"}')
