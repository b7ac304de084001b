"""What is printed and where: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vlm_cli.report.tables import human_bytes

__all__ = ["error", "human_bytes", "notify", "peak_memory", "print_json", "print_table", "step"]


def notify(message: str) -> None:
    """One line for the user, on stderr."""
    print(message, file=sys.stderr, flush=True)


def error(message: str) -> None:
    notify(f"Error: {message}")


def print_json(data: Any, *, indent: int | None = 2) -> None:
    """On stdout; on one line if `indent` is None."""
    print(json.dumps(data, indent=indent, ensure_ascii=False), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", total: bool = False) -> None:
    """A table on stdout; columns after the first are aligned right if they hold numbers.

    Args:
        columns: headings, with units.
        rows: cells.
        title: a line above.
        total: whether the last row stands below a line.
    """
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    table = Table(box=SIMPLE, title=title or None, title_justify="left", pad_edge=False, show_footer=False)
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for i, row in enumerate(rows):
        table.add_row(*map(_plain, row), end_section=total and i == len(rows) - 2)
    if sys.stdout.isatty():
        Console(highlight=False).print(table)
        return
    # A pipe has no width; its reader should get whole lines, and no spaces at their ends.
    console = Console(width=10_000, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().split("\n")), end="", flush=True)


def _plain(cell: str) -> Any:
    from rich.text import Text

    return Text(cell)


def _is_number(cell: str) -> bool:
    first = cell.lstrip("-~ ").split(" ")[0]
    return first in ("", "none") or first.replace(",", "").replace(".", "").rstrip("%").isdigit()


def peak_memory(device: Any) -> int:
    """Bytes: of the process, and of the accelerator if there is one."""
    import resource

    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


@contextmanager
def step(quiet: bool = False) -> Iterator[Any]:
    """A function that announces each step of long work on stderr, with the time of the one before."""
    started: list[tuple[str, float]] = []

    def finish() -> None:
        if started:
            name, since = started.pop()
            notify(f"  {name} … {time.monotonic() - since:.1f} s")

    def announce(name: str) -> None:
        finish()
        started.append((name, time.monotonic()))
        if sys.stderr.isatty():
            print(f"  {name} …", end="\r", file=sys.stderr, flush=True)

    yield (lambda name: None) if quiet else announce
    finish()
