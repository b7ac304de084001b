"""The command line in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from vlm_cli.cli.app import app


def vlm(words: list[str], stdin: bytes = b"") -> tuple[int, str]:
    """Exit code of the command, and its stdout and stderr as a terminal mixes them."""
    result = CliRunner().invoke(app, words, input=stdin)
    return result.exit_code, result.output
