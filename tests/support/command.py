"""The command line in this process."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkProcess
from typing import Any

from typer.testing import CliRunner

from vlm_cli.cli.app import app


def vlm(words: list[str], stdin: bytes = b"") -> tuple[int, str]:
    """Exit code of the command, and its stdout and stderr as a terminal mixes them."""
    result = CliRunner().invoke(app, words, input=stdin)
    return result.exit_code, result.output


def start(*words: Any) -> ForkProcess:
    """Start the command in a copy of this process, for a test that kills it.

    The copy has imported what it needs; a new interpreter would import for seconds first.
    """
    process = multiprocessing.get_context("fork").Process(target=vlm, args=([str(word) for word in words],))
    process.start()
    return process
