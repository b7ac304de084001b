"""One thread and no network: tests are small, and share their machine."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
from typer.testing import CliRunner

from vlm_cli.cli.app import app

# `benchmarks` and `examples` are not packaged. At the end, so that the package that is tested stays the one that is
# installed.
sys.path.append(str(Path(__file__).parents[1]))
torch.set_num_threads(1)
# A shell starts its background jobs with Ctrl-C ignored, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vlm() -> Callable[..., Any]:
    """`vlm(*arguments, input=None)` in this process: exit code, stdout and stderr."""

    def run(*arguments: Any, input: str | bytes | None = None, debug: bool = False) -> Any:
        words = [*(["--debug"] if debug else []), *map(str, arguments)]
        result = CliRunner().invoke(app, words, input=input, catch_exceptions=not debug)
        assert "Traceback" not in result.stdout + result.stderr
        return result

    return run
