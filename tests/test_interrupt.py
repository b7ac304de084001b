"""Signals: what defers them, what ends the process, and what a worker does with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.support import ROOT
from vlm_cli.interrupt import (
    Interrupted,
    at_signal,
    deferred_signals,
    describe_signal,
    ignore_interrupt,
    raising_signals,
)


def test_the_first_signal_sets_a_flag_and_the_second_does_what_it_did_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_signals("stopping") as received:
        assert not received() and received.number is None
        signal.raise_signal(signal.SIGINT)
        assert received() and received.number == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and capsys.readouterr().err == "stopping\n"


def test_a_signal_before_the_block_does_not_count() -> None:
    with deferred_signals():
        signal.raise_signal(signal.SIGTERM)
    with deferred_signals() as received:
        assert not received()
    with pytest.raises(KeyboardInterrupt):  # the twin: outside a block, the first signal raises
        signal.raise_signal(signal.SIGINT)


def test_a_block_leaves_other_signals_and_ignored_ones_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_signals() as received:
            signal.raise_signal(signal.SIGINT)
        assert not received()
        with raising_signals():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    with deferred_signals(numbers=(signal.SIGTERM,)) as received, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not received()


def test_another_thread_gets_no_handler() -> None:
    found: list[bool] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGINT)
        with deferred_signals() as received:
            found.extend([received(), signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_a_user_types_a_signal_raises(number: int) -> None:
    with pytest.raises(Interrupted) as caught, raising_signals():
        signal.raise_signal(number)
    assert caught.value.number == number


def test_a_worker_ignores_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        ignore_interrupt(0)
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_line_for_the_user() -> None:
    assert describe_signal(signal.SIGINT) == "Interrupted."
    assert describe_signal(signal.SIGTERM, "Much is kept.") == "Terminated. Much is kept."


# -- a process that ends -----------------------------------------------------------------------------------------------

#: Where an exception of a handler would be lost. `press` sends a signal to this process.
PLACES = {
    "destructor": "class Dying:\n    def __del__(self): press()\nDying()",
    "callback": "import weakref\nclass X: pass\nx = X()\nr = weakref.ref(x, lambda _: press())\ndel x",
    "except": "try:\n    press()\nexcept BaseException:\n    pass",
    "lock": "import threading\nthreading.Timer(0.2, press).start()\nlock = threading.Lock()\n"
    "lock.acquire()\nlock.acquire()",
    "fork": "import os\nos.register_at_fork(before=press)\nif not os.fork(): os._exit(0)",
}
SCRIPT = """
import os, signal, sys
from vlm_cli.interrupt import {imported}
def press(): os.kill(os.getpid(), {number})
{install}
with at_signal(lambda: print("cleaned", flush=True)), at_signal(lambda: "All is kept."):
{place}
print("went on")
"""


def run(number: int, place: str, install: str = "end_at_signals()") -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(
        imported="at_signal, end_at_signals, deferred_signals",
        number=int(number),
        install=install,
        place="\n".join(f"    {line}" for line in place.splitlines()),
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "Interrupted."), (signal.SIGTERM, "Terminated.")])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_ends_the_process_wherever_it_arrives(number: int, word: str, place: str) -> None:
    result = run(number, PLACES[place])
    assert (result.returncode, result.stdout) == (128 + number, "cleaned\n")
    assert result.stderr == f"{word} All is kept.\n"


def test_the_twin_an_exception_is_lost() -> None:
    result = run(signal.SIGINT, PLACES["destructor"], install="")
    assert result.returncode == 0 and "went on" in result.stdout and "Exception ignored" in result.stderr


def test_a_worker_that_was_just_forked_leaves_the_end_to_its_parent() -> None:
    place = (
        "child = os.fork()\n"
        "if not child:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    for opened in ("end_at_signals()", "end_at_signals(); block = deferred_signals(); block.__enter__()"):
        result = run(signal.SIGINT, place, opened)
        assert (result.returncode, result.stdout, result.stderr) == (0, "143\nwent on\n", "")


def test_the_second_signal_ends_the_process_at_once() -> None:
    place = (
        "with deferred_signals('stopping') as received:\n    press()\n    print(received(), flush=True)\n    press()"
    )
    result = run(signal.SIGTERM, place)
    assert (result.returncode, result.stdout) == (143, "True\ncleaned\n")
    assert result.stderr == "stopping\nTerminated. All is kept.\n"


def test_a_signal_that_the_shell_ignores_stays_ignored() -> None:
    result = run(signal.SIGINT, "press()", "signal.signal(signal.SIGINT, signal.SIG_IGN); end_at_signals()")
    assert (result.returncode, result.stdout) == (0, "went on\n")


def test_a_second_signal_while_the_first_cleans_ends_the_process() -> None:
    place = "with at_signal(press):\n    press()"
    result = run(signal.SIGINT, place)
    assert (result.returncode, result.stderr) == (130, "Interrupted.\n")


def test_actions_of_closed_blocks_are_forgotten() -> None:
    place = "with at_signal(lambda: print('old', flush=True)): pass\npress()"
    assert run(signal.SIGINT, place).stdout == "cleaned\n"
    with at_signal(lambda: None):
        pass


def test_a_copy_of_a_process_ends_its_own_workers_and_not_those_of_the_original() -> None:
    program = """
import multiprocessing, os, signal, time
from vlm_cli.interrupt import end_at_signals
context = multiprocessing.get_context("fork")
def start():
    worker = context.Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    return worker
first = start()
read, write = os.pipe()
copy = os.fork()
if not copy:
    end_at_signals()
    own = start()
    os.write(write, str(own.pid).encode())
    time.sleep(60)
own = int(os.read(read, 20))
os.kill(copy, signal.SIGTERM)
os.waitpid(copy, 0)
time.sleep(0.1)
state = open(f"/proc/{own}/stat").read().split()[2] if os.path.exists(f"/proc/{own}") else "gone"
print(first.is_alive(), state in ("Z", "gone"))
first.kill()
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.returncode) == ("True True\n", 0), ended.stderr
