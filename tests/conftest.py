"""Set up each test process: one thread, no network, a fixed seed, and as many processes as the machine has cores.

This file imports neither torch nor Transformers when it loads: the process that hands out the tests needs none of them.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest

from tests.support import ROOT, seed_torch
from tests.support.grid import leave_to_long_tests

# `benchmarks` and `examples` are not packaged. The checkout comes last, so that the tests see the installed package.
sys.path.append(str(ROOT))
# A shell starts its background jobs with Ctrl-C ignored. The commands that the tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hardening-seed", type=int, default=0, metavar="N", help="Seed of the attack in tests/hardening. [default: 0]"
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run named files in this process, since each worker takes seconds to start; the whole suite takes one per core."""
    names_files = config.invocation_params.args and any(
        not arg.startswith("-") and os.path.exists(arg.partition("::")[0]) for arg in config.invocation_params.args
    )
    return 0 if names_files else min(8, os.cpu_count() or 1)  # a worker takes 1 GB


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to the long tests what the marker `sample` does not choose, unless the user names a case."""
    if not any("[" in arg for arg in config.args):
        leave_to_long_tests(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell the garbage collector to skip all that the imports made, a million objects, and to come less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    # Some tests copy the process to train in the copy. If a backward pass follows torch's fake tensors (of `compile`
    # and `export`), which bring a stand-in for a GPU, then torch starts a thread for that GPU and allows no backward
    # pass in a copy. It looks for GPUs at the first backward pass alone.
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="session", autouse=True)
def _commands_made_once() -> Iterator[None]:
    """Keep the commands that Typer makes of functions: its runner would make all of them anew for each call."""
    import typer.testing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.testing._get_command))
        yield


@pytest.fixture(autouse=True)
def _seed(_one_thread: None) -> None:
    seed_torch(0)


@pytest.fixture(scope="session")
def vlm() -> Callable[..., Any]:
    """`vlm(*arguments, input=None)` in this process: exit code, stdout and stderr."""
    from typer.testing import CliRunner

    from vlm_cli.cli.app import app

    def run(*arguments: Any, input: str | bytes | None = None, debug: bool = False) -> Any:
        words = [*(["--debug"] if debug else []), *map(str, arguments)]
        result = CliRunner().invoke(app, words, input=input, catch_exceptions=not debug)
        assert "Traceback" not in result.stdout + result.stderr
        return result

    return run
