"""Ctrl-C in long work: the first press is recorded, the second one ends the work."""

from __future__ import annotations

import signal
import threading

import pytest

from vlm_cli.interrupt import deferred_interrupt, ignore_interrupt


def test_the_first_press_is_recorded_and_the_second_raises() -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt(lambda: told.append("stopping")) as is_interrupted:
        assert not is_interrupted()
        signal.raise_signal(signal.SIGINT)
        assert is_interrupted() and told == ["stopping"]
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and told == ["stopping"]


def test_a_press_before_the_block_does_not_count() -> None:
    with deferred_interrupt():
        signal.raise_signal(signal.SIGINT)
    with deferred_interrupt() as is_interrupted:
        assert not is_interrupted()
    with pytest.raises(KeyboardInterrupt):  # the twin: outside a block, the first press raises
        signal.raise_signal(signal.SIGINT)


def test_another_thread_gets_no_handler() -> None:
    found: list[bool] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with deferred_interrupt() as is_interrupted:
            found.extend([is_interrupted(), signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, True]


def test_a_worker_ignores_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        ignore_interrupt(0)
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
