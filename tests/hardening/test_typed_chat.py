"""A chat on a terminal: Ctrl-C and SIGTERM end it in one line, and leave the terminal as it was."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.hardening.attempt import TRACEBACK
from tests.hardening.subjects import Workshop
from vlm_cli.cli import app as command_line

pytestmark = pytest.mark.attack


@dataclass
class Terminal:
    """A command on a terminal of its own, and what it has written there."""

    pid: int
    screen: int
    text: str = ""

    def wait_for(self, words: str, seconds: float = 60.0) -> None:
        """Read until the words are written."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline and self.read(), f"{words!r} is not in {self.text!r}"

    def read(self) -> bool:
        """Read what is there; False at the end."""
        if select.select([self.screen], [], [], 0.1)[0]:
            try:
                self.text += os.read(self.screen, 65_536).decode(errors="replace")
            except OSError:  # the other side of the terminal is closed
                return False
        return True

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C, once the line editor waits for a key.

        Python's line editor misses a signal between its prompt and its first wait for a key, until the next key.
        """
        time.sleep(0.5)
        self.type("\x03")

    def modes(self) -> list[object]:
        return termios.tcgetattr(self.screen)

    def end(self, seconds: float = 30.0) -> int:
        """Wait for the end, and return the exit code."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.read()
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.read()
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"the chat goes on: {self.text!r}")


@pytest.fixture
def chat(shop: Workshop) -> Iterator[Terminal]:
    """A chat with a model that says 400 tokens, for a second or more."""
    pid, screen = pty.fork()
    if not pid:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(TERM="xterm", COLUMNS="80")
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
            sys.argv = ["vlm", "chat", str(shop.folder / "model"), "-n", "400", "--temperature", "0"]
            os._exit(command_line.main())
        finally:
            os._exit(99)
    terminal = Terminal(pid, screen)
    terminal.wait_for("> ")
    yield terminal
    os.close(screen)


SIGNALS = [(signal.SIGINT, 130, "Interrupted."), (signal.SIGTERM, 143, "Terminated.")]


@pytest.mark.parametrize(("number", "code", "words"), SIGNALS)
@pytest.mark.parametrize("typed", ["", "half a line"])
def test_a_signal_while_a_user_types(chat: Terminal, typed: str, number: int, code: int, words: str) -> None:
    chat.type(typed)
    chat.wait_for(typed)
    if number == signal.SIGINT:  # the first one clears the line
        chat.interrupt()
        chat.wait_for("a second Ctrl-C.")
    time.sleep(0.5)
    os.kill(chat.pid, number)
    assert chat.end() == code and words in chat.text and not TRACEBACK.search(chat.text), chat.text


def test_the_key_itself(chat: Terminal) -> None:
    chat.type("half a line")
    chat.interrupt()
    chat.wait_for("Ctrl-D ends the chat, and so does a second Ctrl-C.")
    chat.interrupt()
    assert chat.end() == 130 and "Interrupted." in chat.text


def test_ctrl_c_clears_the_line_and_ctrl_d_ends_the_chat(chat: Terminal) -> None:
    chat.type("half a line")
    chat.interrupt()
    chat.wait_for("a second Ctrl-C.")
    time.sleep(0.2)
    chat.type("\x04")
    assert chat.end() == 0


def test_the_terminal_is_left_as_it_was(chat: Terminal) -> None:
    """A line editor switches off the echo and the reading of whole lines while a user types."""
    time.sleep(0.2)
    os.kill(chat.pid, signal.SIGTERM)
    assert chat.end() == 143
    modes = chat.modes()[3]
    assert isinstance(modes, int) and modes & termios.ECHO and modes & termios.ICANON


def test_ctrl_c_ends_an_answer_and_a_second_one_the_chat(chat: Terminal) -> None:
    chat.type("hi\n")
    chat.wait_for("hi\r\n")
    time.sleep(0.3)
    chat.type("\x03")
    answer = chat.text
    while len(re.findall(r"^.{0,12}> ", chat.text, re.MULTILINE)) < 2:
        assert chat.read(), (answer, chat.text)
    chat.interrupt()
    chat.wait_for("a second Ctrl-C.")
    chat.interrupt()
    assert chat.end() == 130 and not TRACEBACK.search(chat.text), chat.text


def test_sigterm_ends_an_answer_and_the_chat(chat: Terminal) -> None:
    chat.type("hi\n")
    chat.wait_for("hi\r\n")
    time.sleep(0.3)
    os.kill(chat.pid, signal.SIGTERM)
    assert chat.end() == 143 and "Terminated." in chat.text and not TRACEBACK.search(chat.text), chat.text
