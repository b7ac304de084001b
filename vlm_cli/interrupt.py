"""Ctrl-C in long work: the first press asks the work to stop soon, the second press stops it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["deferred_interrupt", "ignore_interrupt"]


@contextlib.contextmanager
def deferred_interrupt(on_first: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Inside the block, record the first Ctrl-C, and raise KeyboardInterrupt for the second.

    Outside the main thread Python accepts no signal handler, so the block then changes nothing.

    Args:
        on_first: is called at the first press, for instance to tell the user what happens now.

    Yields:
        A function that tells whether the user has pressed Ctrl-C.
    """
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        on_first()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def ignore_interrupt(worker: int) -> None:
    """Make a worker process ignore Ctrl-C: the main process still needs the worker, and ends it.

    Args:
        worker: number of the worker; torch's DataLoader passes it to each `worker_init_fn`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
