"""Interrupt commands that write: by a signal at any moment or at a line of output, by a disk that is full, or by
streams that nobody reads.

A job is a command and the names that it writes. It runs in a fork of the test process, through `main`, as in a shell.
After an interruption its folder holds nothing half-written, and the same command brings it to the bytes of a run that
nobody interrupted.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.hardening.attempt import TRACEBACK
from tests.support import ROOT
from vlm_cli.cli import app as command_line

__all__ = ["CODES", "Job", "Moment", "Run", "Streams", "Whole", "interrupted", "on_a_full_disk", "run", "uninterrupted"]

MAX_SECONDS = 60.0  # for a command of about a second, on a busy machine
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}

App = Callable[[], object]

#: What differs from run to run: times, and what is made of them.
VARYING = {"seconds", "images_per_second", "tokens_per_second", "memory", "resume", "resumed_from"}
VARYING |= {"flops_per_step", "flops_per_second", "utilisation"}  # estimated from the first pass since the resume


@dataclass(frozen=True)
class Job:
    """A command that writes.

    Attributes:
        name: of the command.
        words: of the command, without `vlm`; it runs in a folder of its own.
        outputs: names that it writes.
        kept: names that an interrupted run may leave, to resume from.
        resume: words to add for the next run.
    """

    name: str
    words: Sequence[str]
    outputs: Sequence[str] = ("out",)
    kept: Sequence[str] = ()
    resume: Sequence[str] = ()


CLOSED, NO_READER, CAPTURED = "closed", "a pipe whose reader has gone", "captured"


@dataclass(frozen=True)
class Streams:
    """What a shell gives to a command: the path of a file, or one of the three constants above."""

    stdin: str = os.devnull
    stdout: str = CAPTURED
    stderr: str = CAPTURED

    def connect(self, captured: int) -> None:
        """Give this process these streams, as Python opens them when it starts.

        Args:
            captured: the descriptor of a stream that is captured.
        """
        handles = [self._open(name, number, captured) for number, name in enumerate(self._names())]
        for number, handle in enumerate(handles):
            os.close(number) if handle is None else os.dup2(handle, number)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            stream = None if handles[number] is None else os.fdopen(number, "w" if number else "r")
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)

    def _names(self) -> tuple[str, str, str]:
        return self.stdin, self.stdout, self.stderr

    def _open(self, name: str, number: int, captured: int) -> int | None:
        if name == CLOSED:
            return None
        if name == CAPTURED:
            return captured
        if name == NO_READER:
            reader, writer = os.pipe()
            os.close(reader)
            return writer
        return os.open(name, os.O_WRONLY if number else os.O_RDONLY)


@dataclass(frozen=True)
class Moment:
    """When a signal is sent: some seconds after the command has begun, or after it has printed a text."""

    seconds: float = 0.0
    text: str = ""

    def __str__(self) -> str:
        return f"{self.seconds:.3f} s after {self.text!r}" if self.text else f"after {self.seconds:.3f} s"


@dataclass(frozen=True)
class Run:
    """How a command ended: its exit code, or the negative number of the signal; and what it printed."""

    code: int
    printed: str
    seconds: float


@dataclass(frozen=True)
class Whole:
    """What an uninterrupted run writes, by name, how long it takes, and what it prints."""

    contents: dict[str, Any]
    names: set[str] = field(default_factory=set)
    seconds: float = 0.0
    printed: str = ""


# -- running -----------------------------------------------------------------------------------------------------------


def run(
    words: Sequence[str],
    folder: Path,
    *,
    prepare: Callable[[], object] = lambda: None,
    interrupt: tuple[signal.Signals, Moment] | None = None,
    is_cold: bool = False,
    app: App | None = None,
    streams: Streams = Streams(),
    watch: Callable[[int], object] = lambda pid: None,
    max_seconds: float = MAX_SECONDS,
) -> Run:
    """Run a command in a fork.

    Args:
        words: of the command, without `vlm`.
        folder: its working directory.
        prepare: called in the fork first.
        interrupt: a signal, and when it is sent. A command that does not print the text gets no signal.
        is_cold: start a new interpreter, as a shell does. The clock begins when it has set its signal handlers: while
            Python itself starts, for some hundredths of a second, no handler of a program can be set.
        app: runs in place of the command.
        streams: its stdin, stdout and stderr.
        watch: called with the id of the process, again and again while it runs.
        max_seconds: time after which the command hangs.
    """
    ready, is_ready = os.pipe()
    output, printed = os.pipe()
    pid = os.fork()
    if not pid:
        try:  # whatever happens, this process must not go on as a second pytest
            os.close(ready)
            os.close(output)
            streams.connect(printed)
            if is_cold:
                _execute(words, folder)
            _become(words, folder, is_ready, prepare, app)
        finally:
            os._exit(99)
    os.close(is_ready)
    os.close(printed)
    if is_cold:
        _wait_for_handlers(pid)
    else:
        select.select([ready], [], [], MAX_SECONDS)
    os.close(ready)
    started = time.monotonic()
    text, code = _wait(pid, output, watch, max_seconds, interrupt)
    return Run(code, text, time.monotonic() - started)


def _execute(words: Sequence[str], folder: Path) -> NoReturn:
    """Replace this process by `vlm`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir(folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "vlm_cli", *words], environment)


def _wait_for_handlers(pid: int) -> None:
    """Wait until a process catches SIGTERM, which Python itself does not, or has ended."""
    bit, deadline = 1 << (signal.SIGTERM - 1), time.monotonic() + MAX_SECONDS
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = status.partition("SigCgt:")[2].split()
        if not caught or int(caught[0], 16) & bit or "State:\tZ" in status:
            return
        time.sleep(0.001)


def _become(
    words: Sequence[str],
    folder: Path,
    is_ready: int,
    prepare: Callable[[], object],
    app: App | None,
) -> None:
    """Be `vlm` in this process, and tell through the pipe when the command begins."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    sys.argv = ["vlm", *words]
    begin = app or command_line.app

    def announced(*args: Any, **keywords: Any) -> Any:
        os.close(is_ready)
        return begin(*args, **keywords)

    command_line.app = announced  # type: ignore[assignment]
    prepare()
    code = command_line.main()
    if app is not None:
        sys.stdout.flush()
    os._exit(code)


def _wait(
    pid: int,
    output: int,
    watch: Callable[[int], object],
    max_seconds: float,
    interrupt: tuple[signal.Signals, Moment] | None,
) -> tuple[str, int]:
    """Read what a process prints until it ends; a worker that outlives it may keep the pipe open."""
    deadline = time.monotonic() + max_seconds
    text, status = b"", None
    with os.fdopen(output, "rb", buffering=0) as file:
        while status is None and time.monotonic() < deadline:
            watch(pid)
            if interrupt is not None and interrupt[1].text.encode() in text:
                time.sleep(interrupt[1].seconds)
                os.kill(pid, interrupt[0])
                interrupt = None
            found, ended = os.waitpid(pid, os.WNOHANG)
            status = ended if found else None
            while select.select([output], [], [], 0.01)[0] and (data := file.read(65_536)):
                text += data
                watch(pid)  # a process that prints without a pause is watched, too
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError(f"process {pid} did not end in {max_seconds} s: {text.decode(errors='replace')}")
    return text.decode(errors="replace"), os.waitstatus_to_exitcode(status)


# -- what is written ---------------------------------------------------------------------------------------------------


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path, outputs: Sequence[str]) -> dict[str, Any]:
    """The bytes of the files that a command wrote, without times."""
    found: dict[str, Any] = {}
    for name in outputs:
        path = folder / name
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files if path.exists() else ():
            found[str(file.relative_to(folder))] = _without_times(file)
    return found


def _without_times(file: Path) -> Any:
    data = file.read_bytes()
    is_training = (file.parent / "training_args.json").exists()
    if is_training and file.name in ("README.md", "loss.png", "run.html"):  # the time, and axes of minutes
        return "written"
    if is_training and file.name == "manifest.json":  # hashes of files that hold times
        return sorted(json.loads(data))
    if file.suffix == ".jsonl":
        return [_pruned(json.loads(line)) for line in data.splitlines()]
    return _pruned(json.loads(data)) if file.name == "training_args.json" else data


def _pruned(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _pruned(x) for key, x in tree.items() if key not in VARYING}
    return tree


def uninterrupted(job: Job, folder: Path) -> Whole:
    """Run a job to its end."""
    ended = run(job.words, folder)
    assert ended.code == 0, ended.printed
    return Whole(contents(folder, job.outputs), names(folder), ended.seconds, ended.printed)


# -- judging -----------------------------------------------------------------------------------------------------------


def interrupted(
    job: Job,
    whole: Whole,
    folder: Path,
    number: signal.Signals,
    moment: Moment,
    app: App | None = None,
    is_cold: bool = False,
) -> list[str]:
    """Send a signal to a job, run it again, and say what is wrong."""
    ended = run(job.words, folder, interrupt=(number, moment), app=app, is_cold=is_cold)
    found = _problems(job, whole, folder, ended, (0, CODES[number]), is_killed=number is signal.SIGKILL)
    return found + _resumed(job, whole, folder, ended, app)


def on_a_full_disk(job: Job, whole: Whole, folder: Path, limit: int, app: App | None = None) -> list[str]:
    """Run a job that may write no file beyond `limit` bytes, run it again without the limit, and say what is wrong."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = run(job.words, folder, prepare=prepare, app=app)
    found = _problems(job, whole, folder, ended, (0, 1))
    if ended.code == 1 and "rror" not in ended.printed:
        found.append("no message")
    return found + _resumed(job, whole, folder, ended, app)


def _problems(
    job: Job, whole: Whole, folder: Path, ended: Run, codes: Sequence[int], *, is_killed: bool = False
) -> list[str]:
    """Say what is wrong after an interruption."""
    there, left = contents(folder, job.outputs), names(folder)
    is_hidden = {name for name in left if name.startswith(f".{job.outputs[0]}.")}
    unexpected = left - whole.names - set(job.kept) - (is_hidden if is_killed else set())
    checks = {
        f"exit code {ended.code}": ended.code not in codes,
        f"printed {ended.printed[-600:]!r}": TRACEBACK.search(ended.printed),
        "half-written": bool(there) and there != whole.contents,
        "nothing written, and exit code 0": ended.code == 0 and not there,
        f"left {sorted(unexpected)}": unexpected,
    }
    journal = folder / f"{job.outputs[0]}.partial"
    if job.name == "batch" and journal.is_file():
        checks["rows lost or repeated"] = not _is_beginning(journal.read_bytes())
    return [name for name, is_wrong in checks.items() if is_wrong]


def _is_beginning(journal: bytes) -> bool:
    """Tell whether a journal holds rows 0, 1, 2, … after its header; a kill may cut its last line."""
    rows = journal.split(b"\n")[1:-1]
    ids = [json.loads(row.partition(b" ")[2])["id"] for row in rows]
    return ids == list(range(len(ids)))


def _resumed(job: Job, whole: Whole, folder: Path, ended: Run, app: App | None) -> list[str]:
    """Run an interrupted job again, and say what differs from an uninterrupted run."""
    if ended.code == 0 or contents(folder, job.outputs) == whole.contents:
        return []  # it had ended, or stood before its last message
    again = run([*job.words, *job.resume], folder, app=app)
    there = contents(folder, job.outputs)
    differ = sorted(name for name in {*there, *whole.contents} if there.get(name) != whole.contents.get(name))
    checks = {
        f"the next run: exit code {again.code}, {again.printed[-300:]!r}": again.code != 0,
        f"the next run differs in {differ}": differ,
        f"the next run leaves {sorted(names(folder) ^ whole.names)}": names(folder) != whole.names,
    }
    return [name for name, is_wrong in checks.items() if is_wrong]
