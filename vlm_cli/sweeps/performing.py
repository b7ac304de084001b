"""Perform a run of a sweep, from wherever it stands: build, train, ask. Each step is a command of vlm."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_cli.errors import OutputExistsError, VLMError
from vlm_cli.locks import locked
from vlm_cli.sweeps.runs import Run

__all__ = ["Launch", "Outcome", "perform"]

#: Runs the words of a command: (words, file of what it says, file of what it prints or None) -> its exit code.
Launch = Callable[[Sequence[str], Path, Path | None], int]

_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "on a full disk")
_LEAST_FREE = 1 << 20  # bytes of a disk that is not full
_WAIT = 120.0  # seconds for the processes of a sweep that was killed, which end by themselves
_MOST_LOG = 1 << 16  # bytes of a log that are searched for an error


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        problem: why it failed; None if it is complete.
        is_full: whether it failed because the disk is full, so that others would fail, too.
    """

    problem: str | None = None
    is_full: bool = False


def perform(run: Run, launch: Launch) -> Outcome:
    """Do what is left of a run. What is done already is not repeated.

    Args:
        run: the run.
        launch: runs a command.
    """
    try:
        run.prepare()
        with locked(run.folder):
            _wait_until_free(run.trained)
            return _perform(run, launch)
    except (VLMError, OSError) as error:
        problem = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        return Outcome(problem, _is_full(problem, run.folder))


def _perform(run: Run, launch: Launch) -> Outcome:
    if not run.is_trained:
        steps = [*([] if run.start.is_dir() else [run.build_words]), run.train_words]
        for words in steps:
            if (code := launch(words, run.log, None)) != 0:
                return _failed(run, words[0], code)
        if not run.settings.lora:  # with adapters, the trained model names this one
            shutil.rmtree(run.start, ignore_errors=True)
    if not run.is_complete:
        partial = run.scores.with_suffix(".partial")
        if (code := launch(run.eval_words, run.log, partial)) != 0:
            return _failed(run, "eval", code)
        os.replace(partial, run.scores)
    return Outcome()


def _failed(run: Run, command: str, code: int) -> Outcome:
    """Say why a command failed: what it said last, or which signal ended it."""
    said = _last_error(run.log)
    if code < 0:
        said = f"signal {-code} ended it{', as when memory runs out' if code == -9 else ''}"
    problem = f"vlm {command} failed: {said or f'exit code {code}'}"
    return Outcome(problem, _is_full(problem, run.folder))


def _last_error(log: Path) -> str:
    """Return the last message of a log that begins with `Error:`, on one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _MOST_LOG))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    found = text.rpartition("Error: ")[2] if "Error: " in text else ""
    return re.sub(r"\s+", " ", found).strip()


def _is_full(problem: str, folder: Path) -> bool:
    """Tell whether a disk was full."""
    try:
        free = shutil.disk_usage(folder if folder.exists() else folder.parent.parent).free
    except OSError:
        free = _LEAST_FREE
    return any(words in problem for words in _FULL) or free < _LEAST_FREE


def _wait_until_free(out: Path) -> None:
    """Wait for a process that writes an output: the last one of a sweep that was killed.

    Raises:
        OutputExistsError: if it does not end.
    """
    end = time.monotonic() + _WAIT
    while True:
        try:
            with locked(out):
                return
        except OutputExistsError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
