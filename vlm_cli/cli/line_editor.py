"""What a user types on a terminal: lines with editing, a history and completion, and turns of several lines."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vlm_cli.cli import console
from vlm_cli.cli.history import History
from vlm_cli.cli.terminal import is_terminal, write
from vlm_cli.interrupt import raising_signals

__all__ = ["BLOCK", "Entry", "LineEditor"]

BLOCK = '"""'  # opens and closes a turn of several lines

#: Python's `input`. `main` takes that name away from libraries, which could ask for what only a user may answer.
_read_line = input

#: What ends a word for readline, so that it shows the end of a path only, and not the line.
_DELIMITERS = " \t\n/:<"

#: From the line before the cursor, where the word begins that Tab completes, and what may stand from there on.
Complete = Callable[[str], tuple[int, list[str]]]


@dataclass(frozen=True)
class Entry:
    """What the user typed, of one line or several; `is_block` if it stood between the marks of a block."""

    text: str
    is_block: bool = False


class LineEditor:
    """Reads what a user types.

    Editing, history and completion are those of Python's `readline`. Without that module, as on Windows, the system's
    console edits the lines.

    Args:
        complete: says what Tab offers.
        history: of earlier chats; None for none.
    """

    def __init__(self, complete: Complete, history: History | None) -> None:
        self.history = None
        self._has_cleared = False  # whether Ctrl-C was the last key
        try:
            import readline
        except ImportError:
            return
        self.history = history
        for line in history.read() if history is not None else ():
            readline.add_history(line)
        readline.set_completer_delims(_DELIMITERS)
        readline.set_completer(_Completer(readline, complete))
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")

    def entries(self) -> Iterator[Entry]:
        """Yield what the user types, until Ctrl-D; skip what has no text.

        Ctrl-C clears what is typed. A second one, with no line between the two, ends the chat.
        """
        while True:
            try:
                entry = self._read_entry()
            except EOFError:
                console.notify("")
                return
            except KeyboardInterrupt as error:
                if self._has_cleared or getattr(error, "number", signal.SIGINT) != signal.SIGINT:
                    raise
                self._has_cleared = True
                console.notify("")
                console.notify("Ctrl-D ends the chat, and so does a second Ctrl-C.")
                continue
            if entry.text.strip():
                yield entry

    def _read_entry(self) -> Entry:
        line = self._read("> ")
        if line.startswith(BLOCK):
            return Entry(self._read_block(line.removeprefix(BLOCK)), is_block=True)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read(". "))
        return Entry("\n".join(lines))

    def _read_block(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(BLOCK):
            lines.append(self._read(". "))
        lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
        return "\n".join(lines).strip("\n")

    def _read(self, prompt: str) -> str:
        # `input` writes its prompt to stdout, among the answers if these go to a file.
        is_shown = is_terminal(sys.stdout)
        if not is_shown:
            write(prompt, end="", to_stderr=True)
        with raising_signals():
            line = _read_line(prompt if is_shown else "")
        self._has_cleared = False
        if self.history is not None and line.strip():
            self.history.add(line)
        return line


class _Completer:
    """Answers readline, which asks for one word after the other."""

    def __init__(self, readline: Any, complete: Complete) -> None:
        self.readline, self.complete = readline, complete
        self.found: list[str] = []

    def __call__(self, word: str, state: int) -> str | None:
        if state == 0:
            line = self.readline.get_line_buffer()[: self.readline.get_endidx()]
            start, found = self.complete(line)
            # A name may hold delimiters, and readline's word is then only its end.
            self.found = [text[len(line) - len(word) - start :] for text in found]
        return self.found[state] if state < len(self.found) else None
