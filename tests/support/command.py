"""The command line in this process, and in copies of it.

A copy has imported what it needs. A new interpreter would import for seconds first.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from vlm_cli.cli.app import app


def vlm(words: list[str], stdin: bytes = b"") -> tuple[int, str]:
    """Exit code of the command, and its stdout and stderr as a terminal mixes them."""
    result = CliRunner().invoke(app, words, input=stdin)
    return result.exit_code, result.output


def start(*words: Any) -> ForkProcess:
    """Start the command in a copy of this process, for a test that kills it."""
    process = multiprocessing.get_context("fork").Process(target=vlm, args=([str(word) for word in words],))
    process.start()
    return process


@dataclass(frozen=True)
class Ended:
    """How a copy ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_in_copy(work: Callable[[], object], *, folder: Path, stdin: bytes = b"", **environment: str) -> Ended:
    """Run a function in a copy of this process, in another folder; what it returns is the exit code."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        pid = fork(work, (given.fileno(), out.fileno(), err.fileno()), folder, environment)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return Ended(code, out.read().decode(), err.read().decode())


def fork(
    work: Callable[[], object], streams: tuple[int, int, int], folder: Path, environment: Mapping[str, str]
) -> int:
    """Start a copy of this process that runs a function and ends; return its number.

    Its stdin, stdout and stderr are the descriptors `streams`, for Python and for all libraries.
    """
    if pid := os.fork():
        return pid
    code: object = 99
    try:  # whatever happens, this process must not go on as a second pytest
        for number, handle in enumerate(streams):
            os.dup2(handle, number)
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        _log_to_stderr()
        os.chdir(folder)
        os.environ.update(environment)
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else 0)


def _log_to_stderr() -> None:
    """Let loggers write where those of a new process would: pytest's records go away, and streams are opened anew."""
    logging.getLogger().handlers.clear()
    for logger in logging.getLogger().manager.loggerDict.values():
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr  # not `setStream`: it flushes the old one, which a test may have closed
