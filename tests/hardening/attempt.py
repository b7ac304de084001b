"""Run commands on hostile files under limits, and say what is wrong with what they did.

The commands run in a fork of the test process, which has imported everything, one after the other. So a case costs what
the command costs, and one that hangs, fills the memory or kills its process ends only the fork: the next case gets
another. Streams are terminals for the command, so that what it would write to a terminal is what is judged.
"""

from __future__ import annotations

import faulthandler
import functools
import io
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from typer.main import get_command

from tests.hardening.mutate import PLANTED_PATHS

__all__ = ["Attempt", "Limits", "Outcome", "faults", "run_all", "vlm_in_process"]

_ADDRESS_SPACE = 6 * 2**30  # bytes that a command may map; beyond, it gets a MemoryError before the machine suffers

Command = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Limits:
    """What a command may use."""

    seconds: float = 20.0  # of computing; on a busy machine, waiting may take three times as long
    bytes: int = 2 * 2**30  # that it adds to the memory of the process


LIMITS = Limits()


@dataclass(frozen=True)
class Attempt:
    """Commands that run one after the other, until one of them fails.

    Attributes:
        name: names the case, with its seed.
        commands: the words of each command, without `vlm`.
        folder: the working directory. Code that was planted in a file leaves `ran` there.
        another_answer: why another answer than that of the whole files is right; empty if none is.
        result: a file or directory that the commands write; its bytes are part of the answer.
        may_open_paths: whether the user wrote the paths, so that a command may open any.
    """

    name: str
    commands: Sequence[Sequence[str]]
    folder: Path
    another_answer: str = ""
    result: Path | None = None
    may_open_paths: bool = False


@dataclass
class Outcome:
    """What an attempt did.

    Attributes:
        end: "done"; "hang", if it was killed for its time; or how its process died.
        code: exit code of the last command.
        stdout: what all commands wrote there.
        stderr: what all commands wrote there.
        result: the bytes of the files that they wrote, by name.
        seconds: of all commands.
        cpu_seconds: of all commands.
        bytes: that the commands added to the memory at most.
        reached: addresses that they asked for, and processes that they started.
        opened: planted paths that they opened.
        ran: whether code in a file ran.
    """

    end: str = "done"
    code: int = 0
    stdout: str = ""
    stderr: str = ""
    result: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes: int = 0
    reached: list[str] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    ran: bool = False

    @property
    def answer(self) -> tuple[str, dict[str, bytes]]:
        return self.stdout, self.result


# -- judging -----------------------------------------------------------------------------------------------------------

CONTROL = re.compile(r"[^\n\t\r\x20-\x7e\xa0-\U0010ffff]")
ERASE_LINE = "\x1b[K"  # progress, which the commands themselves write
TRACEBACK = re.compile(r"Traceback \(most recent|panicked at|Exception ignored in|Fatal Python error|terminate called")
#: How the command line words an error that nobody foresaw.
UNFORESEEN = re.compile(
    r"Run `vlm --debug …` to see where|object has no attribute|object is not \w+able|NoneType|KeyError|out of range"
    r"|to unpack|object does not support|not supported between instances"
)
OUT_OF_MEMORY = re.compile(r"MemoryError|can't allocate memory|Cannot allocate memory")
NOTES = re.compile(r"^(?:Note|Warning): .*$", re.MULTILINE)


def faults(attempt: Attempt, outcome: Outcome, whole: Outcome, limits: Limits = LIMITS) -> list[str]:
    """Name what an attempt did that no command may do; `whole` is the outcome with the files as they were."""
    printed = outcome.stdout + outcome.stderr
    checks = {
        f"died: {outcome.end}": outcome.end not in ("done", "hang"),
        f"hang ({outcome.seconds:.0f} s)": outcome.end == "hang" or outcome.cpu_seconds > limits.seconds,
        f"code {outcome.code}": outcome.end == "done" and outcome.code not in (0, 1, 2),
        "traceback": TRACEBACK.search(printed),
        "unforeseen": UNFORESEEN.search(outcome.stderr),
        f"memory ({outcome.bytes / 2**30:.1f} GB)": outcome.bytes > limits.bytes or OUT_OF_MEMORY.search(printed),
        "escape": CONTROL.search(printed.replace(ERASE_LINE, "")),
        "ran": outcome.ran,
        f"reached {outcome.reached}": outcome.reached,
        f"opened {outcome.opened}": outcome.opened and not attempt.may_open_paths,
        "leak": any(b"root:x:0" in data for data in outcome.result.values()),
        "silent": _is_silent(attempt, outcome, whole),
        "no words": outcome.end == "done" and outcome.code in (1, 2) and not outcome.stderr.strip(),
    }
    return [name for name, found in checks.items() if found]


def _is_silent(attempt: Attempt, outcome: Outcome, whole: Outcome) -> bool:
    """Tell whether another answer came with exit code 0 and without a note."""
    is_told = set(NOTES.findall(outcome.stderr)) - set(NOTES.findall(whole.stderr))
    succeeded = outcome.end == "done" and outcome.code == 0
    return succeeded and not attempt.another_answer and not is_told and outcome.answer != whole.answer


# -- running -----------------------------------------------------------------------------------------------------------


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@functools.cache
def _command() -> Any:
    """What Typer makes of `vlm`; the forks of this process share it."""
    from vlm_cli.cli.app import app

    return get_command(app)


def vlm_in_process(words: Sequence[str]) -> int:
    """Run `vlm` with the streams that the process has; return the exit code."""
    try:
        _command()(list(words), prog_name="vlm")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def run_all(attempts: Sequence[Attempt], command: Command = vlm_in_process, limits: Limits = LIMITS) -> list[Outcome]:
    """Run all attempts in forks of this process."""
    outcomes: list[Outcome] = []
    _command()
    while len(outcomes) < len(attempts):
        outcomes += _run_until_death(attempts[len(outcomes) :], command, limits.seconds)
    return outcomes


def _run_until_death(attempts: Sequence[Attempt], command: Command, max_seconds: float) -> list[Outcome]:
    """Run attempts in one fork, until the fork dies or has run them all."""
    ours, theirs = multiprocessing.Pipe()
    pid = os.fork()
    if not pid:
        try:  # whatever happens, this process must not go on as a second pytest
            ours.close()
            _serve(theirs, attempts, command)
            os._exit(0)
        finally:
            os._exit(99)
    theirs.close()
    outcomes = []
    try:
        for _ in attempts:
            started = time.monotonic()
            if not ours.poll(max_seconds * 3):
                os.kill(pid, signal.SIGKILL)
                outcomes.append(Outcome(end="hang", seconds=time.monotonic() - started))
                break
            outcomes.append(ours.recv())
    except EOFError:
        outcomes.append(Outcome(end=f"status {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}"))
        return outcomes
    finally:
        ours.close()
    os.waitpid(pid, 0)
    return outcomes


def _serve(connection: Connection, attempts: Sequence[Attempt], command: Command) -> None:
    """Run attempts in this fork, and send each outcome."""
    faulthandler.disable()  # pytest's would print where a command died
    seen: list[tuple[str, str]] = []
    sys.addaudithook(lambda event, args: _audit(seen, event, args))
    os.environ |= {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    soft = _memory("VmSize") + _ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    with tempfile.TemporaryFile() as unseen:  # what libraries write past Python's streams
        os.dup2(unseen.fileno(), 1)
        os.dup2(unseen.fileno(), 2)
        for attempt in attempts:
            seen.clear()
            os.ftruncate(unseen.fileno(), 0)
            os.lseek(unseen.fileno(), 0, os.SEEK_SET)
            outcome = _run(attempt, command)
            unseen.seek(0)
            outcome.stderr += unseen.read().decode(errors="replace")
            outcome.reached = [what for kind, what in seen if kind == "reached"]
            outcome.opened = [what for kind, what in seen if kind == "opened"]
            connection.send(outcome)


def _run(attempt: Attempt, command: Command) -> Outcome:
    outcome = Outcome()
    mark = attempt.folder / "ran"
    os.environ["PLANTED"] = str(mark)
    os.chdir(attempt.folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started, cpu_started = _memory("VmRSS"), time.monotonic(), time.process_time()
    streams = {name: _Terminal(io.BytesIO(), encoding="utf-8", errors="backslashreplace") for name in ("out", "err")}
    kept = sys.stdin, sys.stdout, sys.stderr
    # A question on stdin would get the answer yes.
    sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(b"y\n" * 9)), streams["out"], streams["err"]
    try:
        for words in attempt.commands:
            outcome.code = command(words)
            if outcome.code:
                break
    except BaseException:
        outcome.code = 99
        traceback.print_exc()
    finally:
        for stream in streams.values():
            stream.flush()
        sys.stdin, sys.stdout, sys.stderr = kept
    outcome.seconds, outcome.cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    outcome.bytes = _memory("VmHWM") - before
    outcome.stdout, outcome.stderr = (stream.buffer.getvalue().decode() for stream in streams.values())  # type: ignore[attr-defined]
    outcome.ran = mark.exists()
    outcome.result = dict(_files(attempt.result)) if attempt.result is not None else {}
    return outcome


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_file():
        yield path.name, path.read_bytes()
    for file in sorted(path.rglob("*")) if path.is_dir() else ():
        if file.is_file():
            yield str(file.relative_to(path)), file.read_bytes()


def _memory(key: str) -> int:
    """A number of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{key}:")[2].split()[0]) * 1024


def _audit(seen: list[tuple[str, str]], event: str, args: tuple[Any, ...]) -> None:
    """Note what a command reaches for; an audit hook sees it, whichever library does it."""
    if event in ("socket.connect", "socket.getaddrinfo", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        seen.append(("reached", f"{event} {str(args)[:80]}"))
    elif event == "open":
        with suppress(Exception):
            if any(os.path.realpath(str(args[0])) == os.path.realpath(path) for path in PLANTED_PATHS):
                seen.append(("opened", str(args[0])))
