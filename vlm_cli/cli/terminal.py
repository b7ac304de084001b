"""Every write to the user's terminal. Text that a file brings is shown there, and never acts on the terminal.

A terminal gets control characters as escapes. Pipes and files get the text as it is.

Functions of this module write to stdout and stderr, and `console` builds on them. `guard_streams` puts the same rule
before everything else that writes there: Typer's messages, warnings, tracebacks, and progress bars of libraries.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from rich.cells import cell_len, set_cell_size

from vlm_cli.printable import escape_controls

__all__ = [
    "guard_streams",
    "has_colours",
    "is_terminal",
    "keep_stdout",
    "overwrite_line",
    "unguarded",
    "width",
    "write",
    "write_styled",
]


def is_terminal(stream: Any) -> bool:
    """Tell whether a stream of this process is a terminal. Python has None for a stream that is closed."""
    return stream is not None and stream.isatty()


def has_colours(*, on_stderr: bool = False) -> bool:
    """Tell whether a stream shows colours: a terminal does, unless NO_COLOR is set (https://no-color.org)."""
    stream = sys.stderr if on_stderr else sys.stdout
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def width() -> int:
    """Return the columns of the terminal: those that COLUMNS names, or its own, or 80."""
    return shutil.get_terminal_size().columns


def write(text: str, *, end: str = "\n", to_stderr: bool = False, keep: str = "") -> None:
    """Write text at once; on a terminal, show its control characters as escapes.

    Args:
        text: from anywhere.
        end: a line end or another text of vlm itself, which is written as it is.
        to_stderr: write to stderr, not stdout.
        keep: control characters that the text may have, such as the line ends of an answer.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    _write(stream, (escape_controls(text, keep) if is_terminal(stream) else text) + end)


def overwrite_line(text: str, end: str = "") -> None:
    """Write a line on the terminal of stderr, over what stands on that line. A longer line than the terminal is cut.

    Args:
        text: without line ends.
        end: what follows: nothing, so that the cursor stays behind the text, or a carriage return.
    """
    _write(sys.stderr, f"\r{_cut(escape_controls(text), width() - 1)}\x1b[K{end}")


def write_styled(text: str, *, to_stderr: bool = False) -> None:
    """Write text with colours. The caller has escaped whatever a file brought into it."""
    _write(sys.stderr if to_stderr else sys.stdout, text)


@contextlib.contextmanager
def keep_stdout() -> Iterator[None]:
    """Let stderr have what other libraries print on stdout, which is for the result of the command."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def unguarded(stream: TextIO) -> TextIO:
    """Return the stream behind a guard, for a writer that moves the cursor and shows only text of vlm itself."""
    return stream.stream if isinstance(stream, GuardedStream) else stream


def _cut(text: str, columns: int) -> str:
    """Cut a text that needs more columns of a terminal; a Chinese character takes two."""
    return text if cell_len(text) <= columns else set_cell_size(text, columns)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is not None:
        print(text, end="", file=unguarded(stream), flush=True)


#: How tqdm moves the cursor: to the lines of other bars, or to the start of its own.
_BAR_MOVES = re.compile(r"\n*(\x1b\[A)*\Z|\r")


class GuardedStream:
    """A terminal that shows control characters as escapes, whoever writes to it. All else is the stream's own.

    Args:
        stream: stdout or stderr, as Python opened it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write text; progress bars of libraries may move the cursor as `_BAR_MOVES` says."""
        is_bar = sys._getframe(1).f_globals.get("__name__", "").startswith("tqdm.")
        start = found.end() if is_bar and (found := _BAR_MOVES.match(text)) else 0
        self.stream.write(text[:start] + escape_controls(text[start:], keep="\n\t"))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_streams() -> None:
    """Show control characters as escapes on stdout and stderr, each where it is a terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            # A file name may hold bytes that are not text, and a terminal may not have every character.
            stream.reconfigure(errors="backslashreplace")
        if is_terminal(stream):
            setattr(sys, name, cast(TextIO, GuardedStream(stream)))
