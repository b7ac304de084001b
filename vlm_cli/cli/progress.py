"""How far long work is, in one line on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from vlm_cli.cli import console, terminal
from vlm_cli.printable import count_of

__all__ = ["ProgressLine", "format_duration"]

TERMINAL_SECONDS = 0.2  # between two updates of the line on a terminal
PIPE_SECONDS = 10.0  # between two lines where stderr is a file or a pipe


class ProgressLine:
    """Show how many items are done, how many per second, and the time left.

    A terminal shows one line that changes. A file or a pipe gets a line every ten seconds. --quiet leaves both out.

    Args:
        total: number of items; None if nobody knows it yet.
        noun: what to call the items.
        done_before: how many of them an earlier run has done.
        has_summary: whether to write the number of items and the time at the end.
    """

    def __init__(
        self, total: int | None, *, noun: str = "items", done_before: int = 0, has_summary: bool = True
    ) -> None:
        self.total, self.noun, self.done_before, self.has_summary = total, noun, done_before, has_summary
        self.started = time.monotonic()
        self.is_terminal = terminal.is_terminal(sys.stderr)
        self.interval = TERMINAL_SECONDS if self.is_terminal else PIPE_SECONDS
        self.shown = self.started

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if console.is_quiet():
            return
        if error is None and self.has_summary:
            self._print(self._summary(time.monotonic() - self.started))
            if self.is_terminal:
                console.notify("")
            return
        self._end_line()

    def show(self, done: int) -> None:
        """Show that `done` items are done, including those of an earlier run."""
        now = time.monotonic()
        if console.is_quiet() or done == self.total or now - self.shown < self.interval:
            return
        self.shown = now
        rate = (done - self.done_before) / (now - self.started)
        if self.total is None:
            self._print(f"  {done:,} {self.noun}, {rate:.1f} {self.noun}/s")
            return
        left = format_duration((self.total - done) / rate) if rate else "unknown time"
        self._print(f"  {done:,} of {self.total:,}, {rate:.1f} {self.noun}/s, {left} left")

    def notify(self, message: str) -> None:
        """Write a message on a line of its own."""
        self._end_line()
        console.notify(message)

    def _summary(self, seconds: float) -> str:
        total = self.total or 0
        done = count_of(total, self.noun.removesuffix("s"))
        return f"  {done} in {format_duration(seconds)}, {total / seconds:.1f} {self.noun}/s"

    def _end_line(self) -> None:
        if self.is_terminal and self.shown != self.started:
            console.notify("")

    def _print(self, text: str) -> None:
        """Print the line; on a terminal, the next line overwrites it."""
        if self.is_terminal:
            terminal.overwrite_line(text)
        else:
            console.notify(text)


def format_duration(seconds: float) -> str:
    """Write a duration in the two units that matter.

    >>> format_duration(3725), format_duration(62), format_duration(4.21)
    ('1 h 02 min', '1 min 02 s', '4.2 s')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
