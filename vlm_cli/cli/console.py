"""What commands print: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_cli.cli import terminal
from vlm_cli.printable import escape_controls, escape_json_controls
from vlm_cli.report.tables import human_bytes

if TYPE_CHECKING:
    import torch

__all__ = [
    "announced_steps",
    "error",
    "human_bytes",
    "notify",
    "peak_memory",
    "print_answer",
    "print_json",
    "print_line",
    "print_lines",
    "print_table",
    "write_answer",
]


def notify(message: str) -> None:
    """Print one line for the user on stderr."""
    terminal.write(message, to_stderr=True)


def error(message: str) -> None:
    """Print an error on stderr. Its message may have several lines."""
    terminal.write(f"Error: {message}", to_stderr=True, keep="\n")


def print_line(text: str) -> None:
    """Print one line on stdout."""
    terminal.write(text)


def print_lines(text: str) -> None:
    """Print a text of several lines on stdout; the text brings its last line end, too."""
    terminal.write(text, end="", keep="\n")


def write_answer(text: str) -> None:
    """Print a piece of an answer on stdout."""
    terminal.write(text, end="", keep="\n\t")


def print_answer(text: str) -> None:
    """Print an answer on stdout, or, after its last piece, the end of its last line."""
    terminal.write(text, keep="\n\t")


def print_json(data: Any, *, indent: int | None = 2) -> None:
    """Print data as JSON on stdout, on one line if `indent` is None."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    if terminal.is_terminal(sys.stdout):
        text = escape_json_controls(text)  # JSON itself escapes only C0
    terminal.write(text, keep="\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", total: bool = False) -> None:
    """Print a table on stdout. A column of numbers is aligned right.

    Args:
        columns: headings, with units.
        rows: cells.
        title: a line above the table.
        total: whether to draw a line above the last row.
    """
    is_terminal = terminal.is_terminal(sys.stdout)

    def plain(text: str) -> Text:
        """Return text that rich does not search for markup."""
        return Text(escape_controls(text) if is_terminal else text)

    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    table = Table(
        box=SIMPLE, title=plain(title) if title else None, title_justify="left", pad_edge=False, show_footer=False
    )
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(plain(name), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for i, row in enumerate(rows):
        table.add_row(*map(plain, row), end_section=total and i == len(rows) - 2)
    # A pipe has no width; print whole lines, without spaces at their ends.
    console = Console(highlight=False) if is_terminal else Console(width=10_000, highlight=False)
    with console.capture() as captured:
        console.print(table)
    text = captured.get()
    terminal.write_styled(text if is_terminal else "\n".join(line.rstrip() for line in text.split("\n")))


def _is_number(cell: str) -> bool:
    """Tell whether a cell belongs in a column of numbers: "12.5%", "~3 GB", "none" and "" do."""
    first = cell.lstrip("-~ ").split(" ")[0]
    return first in ("", "none") or first.replace(",", "").replace(".", "").rstrip("%").isdigit()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far, plus those on the accelerator if `device` is one."""
    import resource

    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


@contextmanager
def announced_steps(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Yield a function that announces the next step on stderr, and prints how long the step before took."""
    started: list[tuple[str, float]] = []

    def finish() -> None:
        if started:
            name, since = started.pop()
            notify(f"  {name} … {time.monotonic() - since:.1f} s")

    def announce(name: str) -> None:
        finish()
        started.append((name, time.monotonic()))
        if terminal.is_terminal(sys.stderr):
            terminal.overwrite_line(f"  {name} …", end="\r")

    yield (lambda name: None) if quiet else announce
    finish()
