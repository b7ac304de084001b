"""SIGINT (Ctrl-C) and SIGTERM end a command: once, with one line on stderr and exit code 130 or 143.

Python runs a signal handler between two instructions of the main thread, wherever that thread is. An exception that a
handler raises there gets lost in a destructor, in a callback of C code, or while a process forks, and the command goes
on. So a handler of this module does one of two things:

    deferred_signals    Sets a flag, at which a loop looks. For work that must come to a good end: the step of a
                        training run, the answer of a chat, a rename. The second signal does what follows.
    end_at_signals      Ends the process on the spot, as the system's own handler does, after it has removed what
                        would be left behind (`at_signal`). For everything else: it needs no loop that looks at a flag,
                        so it also ends imports, the loading of a model, the rows of a batch and a read from a pipe.

One place is an exception, in both meanings: while a user types (`raising_signals`), the terminal is in a mode that only
Python's `input` restores, and nothing else is under way.

No handler runs while C code holds the main thread, as in a long matrix product. The signal then waits for its end.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from vlm_cli.printable import escape_controls

__all__ = [
    "ALL_SIGNALS",
    "Deferred",
    "Interrupted",
    "at_signal",
    "deferred_signals",
    "describe_signal",
    "end_at_signals",
    "ignore_interrupt",
    "raising_signals",
    "removed_at_end",
    "undivided",
]

_Made = TypeVar("_Made")

_WORDS = {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Terminated."}
ALL_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_actions: list[Callable[[], str | None]] = []  # of the `at_signal` blocks that are open, the innermost last
_process = 0  # the process that called `end_at_signals`; the workers that it forks inherit its handlers


class Interrupted(KeyboardInterrupt):
    """A signal ended the work, in good order. The text says what is kept.

    Attributes:
        number: the signal.
    """

    def __init__(self, kept: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(kept)
        self.number = number


class Deferred:
    """The flag of `deferred_signals`: call it to ask whether a signal has arrived.

    Attributes:
        number: the signal; None before it arrives.
    """

    number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None


def describe_signal(number: int, kept: str = "") -> str:
    """Return the line that tells the user which signal ended the command, and what is kept."""
    return " ".join(filter(None, [_WORDS[signal.Signals(number)], kept]))


# -- the end of the process --------------------------------------------------------------------------------------------


def end_at_signals() -> None:
    """Let SIGINT and SIGTERM end this process from now on. A signal that the caller ignores stays ignored."""
    global _process
    _process = os.getpid()
    for number in _accepted(ALL_SIGNALS):
        signal.signal(number, _end)


@contextlib.contextmanager
def at_signal(action: Callable[[], str | None]) -> Iterator[None]:
    """Call `action` if a signal ends the process inside the block.

    Args:
        action: removes what the process would leave behind. It may return a sentence that says what is kept.
    """
    _actions.append(action)
    try:
        yield
    finally:
        _actions.remove(action)


def _end(number: int, frame: Any) -> None:
    if _is_worker(_process, number):
        return
    for other in ALL_SIGNALS:
        signal.signal(other, _end_without_cleaning)
    kept = []
    for action in reversed(_actions):
        with contextlib.suppress(Exception):
            kept.append(action() or "")
    _kill_workers()
    _tell(describe_signal(number, " ".join(filter(None, kept))))
    os._exit(128 + number)


def _end_without_cleaning(number: int, frame: Any) -> NoReturn:
    _tell(describe_signal(number))
    os._exit(128 + number)


def _kill_workers() -> None:
    """End the processes that decode images, which would otherwise live for some more seconds."""
    if "multiprocessing.process" in sys.modules:
        import multiprocessing

        with contextlib.suppress(Exception):
            for worker in multiprocessing.active_children():
                # A process that is a copy of another one knows that one's workers, too, and leaves them alone.
                if getattr(worker, "_parent_pid", None) == os.getpid():
                    worker.kill()


def _tell(line: str) -> None:
    """Write a line on stderr, around Python's buffer, in which the main thread may be writing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        try:
            file = sys.stderr.fileno()
        except io.UnsupportedOperation:  # in a test, stderr is no file
            print(line, file=sys.stderr)
            return
        if os.isatty(file):
            line = f"\n{escape_controls(line)}"  # a progress line may stand there
        os.write(file, f"{line}\n".encode(errors="backslashreplace"))


# -- work that comes to a good end -------------------------------------------------------------------------------------


@contextlib.contextmanager
def deferred_signals(announcement: str = "", *, numbers: Sequence[int] = ALL_SIGNALS) -> Iterator[Deferred]:
    """Inside the block, set a flag at the first signal, and let the second one do what it did before the block.

    Outside the main thread Python accepts no signal handler, so the block then changes nothing.

    Args:
        announcement: a line for the user at the first signal, which says what happens now.
        numbers: the signals; the block does not change what others do.

    Yields:
        The flag.
    """
    deferred, process = Deferred(), os.getpid()
    before = {number: signal.getsignal(number) for number in _accepted(numbers)}

    def handle(number: int, frame: Any) -> None:
        if _is_worker(process, number):
            return
        if deferred.number is None:
            deferred.number = number
            if announcement:
                _tell(announcement)
            return
        _deliver(number, before[number], frame)

    for number in before:
        signal.signal(number, handle)
    try:
        yield deferred
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Let a signal wait for the end of the block, which is short, such as two renames that belong together."""
    received = Deferred()
    try:
        with deferred_signals() as received:
            yield
    finally:
        if received.number is not None:
            signal.raise_signal(received.number)


@contextlib.contextmanager
def removed_at_end(make: Callable[[], _Made], remove: Callable[[_Made], None]) -> Iterator[_Made]:
    """Make something for the block, and remove it at the end of the block or when a signal ends the process.

    A signal that arrives while `make` works waits for its end. One that arrives while `remove` works calls it again.

    Args:
        make: makes a file, a directory or a lock; it takes no longer than a moment.
        remove: removes it, if it is still there.
    """
    with contextlib.ExitStack() as actions:
        with undivided():
            made = make()
            actions.enter_context(at_signal(lambda: remove(made)))
        try:
            yield made
        finally:
            remove(made)


@contextlib.contextmanager
def raising_signals() -> Iterator[None]:
    """Inside the block, raise `Interrupted` at a signal. For a block that waits for a user who types."""
    before = {number: signal.getsignal(number) for number in _accepted(ALL_SIGNALS)}

    def handle(number: int, frame: Any) -> NoReturn:
        raise Interrupted(number=number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _deliver(number: int, handler: Any, frame: Any) -> None:
    """Do with a signal what `handler`, as `signal.getsignal` returned it, does."""
    if callable(handler):
        handler(number, frame)
    else:
        signal.signal(number, handler)
        signal.raise_signal(number)


def _accepted(numbers: Sequence[int]) -> list[int]:
    """Return the signals for which this thread may set a handler, and that the caller does not ignore."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


# -- workers -----------------------------------------------------------------------------------------------------------


def ignore_interrupt(worker: int) -> None:
    """Make a worker process ignore Ctrl-C: the main process still needs the worker, and ends it.

    Args:
        worker: number of the worker; torch's DataLoader passes it to each `worker_init_fn`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_worker(process: int, number: int) -> bool:
    """Tell whether this is not `process` but a worker that it forked a moment ago. SIGTERM ends the worker here."""
    if os.getpid() == process:
        return False
    if number == signal.SIGTERM:
        os._exit(128 + number)
    return True
