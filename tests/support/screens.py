"""Terminals: as objects in this process, and pseudo-terminals for commands."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.support.command import fork


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


Screens = Callable[[], tuple[Terminal, Terminal]]

#: Runs commands one after the other, as `vlm` does, and writes a line before each.
_RUNNER = """
import json, sys
from vlm_cli.cli import terminal
from vlm_cli.cli.app import app, silence_libraries_at_start
silence_libraries_at_start()
terminal.guard_streams()
for name, words in json.loads(sys.argv[1]).items():
    print(f"<<{name}>>", flush=True)
    try:
        app(words)
    except SystemExit:
        pass
"""


def commands_on_a_terminal(
    commands: Mapping[str, list[str]],
    environment: dict[str, str],
    run: Callable[[list[str], dict[str, str]], str] | None = None,
) -> dict[str, str]:
    """Run commands of `vlm` one after the other; return what a terminal receives of each, by its name."""
    run = run or copy_on_a_terminal
    _, *received = re.split(r"<<([\w-]+)>>\r\n", run(["-c", _RUNNER, json.dumps(commands)], environment))
    return dict(zip(received[::2], received[1::2], strict=True))


def on_a_terminal(words: list[str], environment: dict[str, str], keys: bytes = b"") -> str:
    """Run Python on a pseudo-terminal, and type keys; return what the terminal receives."""
    main, side = pty.openpty()
    os.write(main, keys)
    stdin = side if keys else subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, *words], stdin=stdin, stdout=side, stderr=side, env=environment)
    os.close(side)
    shown = read_all(main)
    process.wait(5)
    return shown


def copy_on_a_terminal(words: list[str], environment: dict[str, str]) -> str:
    """Run a script on a pseudo-terminal in a copy of this process, as `on_a_terminal` runs it in a new one."""
    main, side = pty.openpty()
    _, script, *arguments = words

    def work() -> None:
        sys.argv = ["-c", *arguments]
        exec(script, {})

    with open(os.devnull) as nothing:
        pid = fork(work, (nothing.fileno(), side, side), Path.cwd(), environment)
    os.close(side)
    shown = read_all(main)
    assert os.waitpid(pid, 0)[1] == 0
    return shown


def read_all(main: int) -> str:
    """What a pseudo-terminal receives until the process on its other side ends."""
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if not select.select([main], [], [], 1)[0]:
            continue
        try:
            shown += os.read(main, 65_536)
        except OSError:  # the process has ended
            break
    os.close(main)
    return shown.decode("utf-8")
