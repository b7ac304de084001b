"""What commands print: data on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vlm_cli.cli import terminal
from vlm_cli.errors import VLMWarning
from vlm_cli.plain_data import finite
from vlm_cli.printable import escape_controls, escape_json_controls
from vlm_cli.report.tables import OPTIONAL_HEADS, human_bytes, parameter_heads, parameter_rows

if TYPE_CHECKING:
    import torch

    from vlm_cli.report.parameters import ParameterReport

__all__ = [
    "announced_steps",
    "be_quiet",
    "error",
    "human_bytes",
    "is_quiet",
    "note",
    "notify",
    "peak_memory",
    "print_answer",
    "print_json",
    "print_line",
    "print_lines",
    "print_marked",
    "print_parameters",
    "print_section",
    "print_table",
    "shortens_numbers",
    "styled",
    "warnings_as_notes",
    "wrapped",
    "write_answer",
]


def notify(message: str) -> None:
    """Print one line for the user on stderr."""
    terminal.write(message, to_stderr=True)


#: Whether `note` prints nothing; each command sets it anew.
_quiet = False


def be_quiet(quiet: bool = True) -> bool:
    """Let `note` print nothing, or again something; return the argument, as Typer wants it of an option's callback."""
    global _quiet
    _quiet = quiet
    return quiet


def is_quiet() -> bool:
    """Tell whether the user wants neither notes nor progress."""
    return _quiet


def note(message: str) -> None:
    """Print one line on stderr that the user can do without, unless they gave --quiet."""
    if not _quiet:
        notify(message)


def error(message: str) -> None:
    """Print an error on stderr. Its message may have several lines."""
    terminal.write_styled(styled("Error:", "red", to_stderr=True), to_stderr=True)
    terminal.write(f" {message}", to_stderr=True, keep="\n")


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
    if isinstance(sys.stdout, io.TextIOWrapper) and not terminal.is_terminal(sys.stdout):
        sys.stdout.reconfigure(encoding="utf-8")  # JSON is UTF-8, whatever the locale
    # A terminal of another encoding shows escapes.
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(finite(data), indent=indent, ensure_ascii=not is_utf8, allow_nan=False)
    if terminal.is_terminal(sys.stdout):
        text = escape_json_controls(text)  # JSON itself escapes only C0
    terminal.write(text, keep="\n")


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    total: bool = False,
    optional: Sequence[str] = (),
) -> None:
    """Print a table on stdout. A column of numbers is aligned right.

    A terminal that is too narrow gets fewer columns, and a note about them; other texts than those of the first column
    and numbers go on in the next line, after a space. No word is broken, since the user may have to copy it.

    Args:
        columns: headings, with units.
        rows: cells.
        title: a line above the table.
        total: whether to draw a line above the last row.
        optional: headings of the columns that a narrow terminal does without, the least important one first.
    """
    if not terminal.is_terminal(sys.stdout):
        # A pipe has no width; print whole lines, without spaces at their ends.
        lines = _draw(_make_table(columns, rows, title, total, gap=3), 10_000).split("\n")
        terminal.write_styled("\n".join(line.rstrip() for line in lines))
        return
    left_out: list[str] = []
    for name in ("", *optional):  # the first attempt leaves nothing out
        left_out += [name] if name and name in columns else []
        kept = [i for i, column in enumerate(columns) if column not in left_out]
        shown = [[escape_controls(row[i]) for i in kept] for row in rows]
        table = _make_table([escape_controls(columns[i]) for i in kept], shown, escape_controls(title), total, gap=2)
        least = _least_width(table)
        if least <= terminal.width():
            break
    terminal.write_styled(_draw(table, max(least, terminal.width())))
    if left_out:
        note = f"Not shown in {terminal.width()} columns: {', '.join(left_out)}. A wider terminal or a file has them."
        for line in wrap(note, terminal.width()):
            notify(line)


def _make_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, total: bool, gap: int) -> Table:
    """Make a table of texts that rich does not search for markup. Its columns are as wide as their longest word."""
    table = Table(
        box=SIMPLE,
        title=Text(title) if title else None,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, gap - 2),  # the box itself has a column
    )
    for i, name in enumerate(columns):
        cells = [name, *(row[i] for row in rows)]
        is_number = all(_is_number(row[i]) for row in rows)
        words = cells if is_number or i == 0 else [word for cell in cells for word in cell.split()]
        table.add_column(
            Text(name),
            justify="right" if is_number else "left",
            no_wrap=is_number or i == 0,
            min_width=max(map(cell_len, words), default=0),
        )
    for i, row in enumerate(rows):
        table.add_row(*map(Text, row), end_section=total and i == len(rows) - 2)
    return table


def _least_width(table: Table) -> int:
    """Return the columns of a terminal that a table needs."""
    wide = Console(width=10_000)
    return Measurement.get(wide, wide.options, table).minimum


def _draw(table: Table, width: int) -> str:
    """Write a table as text, with styles if stdout shows colours."""
    colours: Any = "auto" if terminal.has_colours() else None
    console = Console(width=width, highlight=False, color_system=colours)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def print_section(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a title, and below it rows of a name, cells and a text; an empty line follows.

    If a terminal is too narrow for a row, the texts of all rows stand below their names. No word is broken.
    """
    names = max(len(row[0]) for row in rows)
    lines = [[f"  {name:<{names}}  {'  '.join(cells)}".rstrip() for name, *cells in rows]]
    print_line(title)
    if not terminal.is_terminal(sys.stdout) or all(cell_len(line) <= terminal.width() for line in lines[0]):
        for line in lines[0]:
            print_line(line)
    else:
        for name, *cells, text in rows:
            print_line(f"  {name:<{names}}  {'  '.join(cells)}".rstrip())
            for line in wrapped(text, 4):
                print_line(line)
    print_line("")


def wrapped(text: str, indent: int) -> list[str]:
    """Return an indented text in lines that fit the terminal of stdout, or in one line for a pipe."""
    lines = [text] if text else []
    if terminal.is_terminal(sys.stdout):
        lines = wrap(text, terminal.width() - indent, break_long_words=False, break_on_hyphens=False)
    return [" " * indent + line for line in lines]


def print_marked(mark: str, style: str, text: str) -> None:
    """Print a mark of vlm itself in a colour on stdout, and behind it a text, which may have lines."""
    terminal.write_styled(styled(mark, style))
    terminal.write(f" {text}", keep="\n")


def print_parameters(report: ParameterReport, exact: bool) -> None:
    """Print a table of parameters, with short numbers on a terminal unless the user wants exact ones."""
    rows = parameter_rows(report, short=shortens_numbers(exact))
    print_table(parameter_heads(report), rows, total=True, optional=OPTIONAL_HEADS)


def styled(text: str, style: str, *, to_stderr: bool = False) -> str:
    """Return a text of vlm itself in a colour or in bold, if the stream shows colours."""
    code = {"bold": "1", "red": "31", "green": "32", "yellow": "33"}[style]
    return f"\x1b[{code}m{text}\x1b[0m" if terminal.has_colours(on_stderr=to_stderr) else text


def shortens_numbers(exact: bool) -> bool:
    """Tell whether a table on stdout has short numbers, as 428.3 M: on a terminal, unless the user wants exact ones."""
    return terminal.is_terminal(sys.stdout) and not exact


def _is_number(cell: str) -> bool:
    """Tell whether a cell belongs in a column of numbers: "12.5%", "~3 GB", "none" and "" do."""
    first = cell.lstrip("-~ ").split(" ")[0]
    return first in ("", "none") or first.replace(",", "").replace(".", "").rstrip("%").isdigit()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far, plus those on the accelerator if `device` is one."""
    from vlm_cli.modeling import memory

    return memory.peak_memory(device)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print each `VLMWarning` of the block once, as a note on stderr. Other warnings appear as before."""
    told: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", VLMWarning)
        show = warnings.showwarning

        def print_note(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
            if not issubclass(category, VLMWarning):
                show(message, category, *args, **kwargs)
            elif str(message) not in told:
                told.add(str(message))
                notify(f"Note: {message}")

        warnings.showwarning = print_note
        yield


@contextmanager
def announced_steps(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Yield a function that announces the next step on stderr, and prints how long the step before took.

    Without a name, no other step follows at once.
    """
    started: list[tuple[str, float]] = []

    def finish() -> None:
        if started:
            name, since = started.pop()
            notify(f"  {name} … {time.monotonic() - since:.1f} s")

    def announce(name: str) -> None:
        finish()
        if not name:
            return
        started.append((name, time.monotonic()))
        if terminal.is_terminal(sys.stderr):
            terminal.overwrite_line(f"  {name} …", end="\r")

    yield (lambda name: None) if quiet else announce
    finish()
