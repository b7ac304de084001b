"""Commands whose stdin, stdout, stderr, folders or locale are broken: one message or none, and the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.grid import first_of, first_rows

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")

FULL = "Error: cannot write the output: No space left on device.\n"
CLOSED = "Error: cannot write the output: Bad file descriptor.\n"

#: Redirections of a shell, what stderr then holds (None: whatever it holds without them), and the exit code.
STREAMS = {
    ">&-": (CLOSED, 1),
    ">&- 2>&- <&-": ("", 1),
    ">/dev/null 2>&-": ("", 0),
    "| head -c 0": ("", 1),
    ">/dev/full": (FULL, 1),
    ">/dev/full 2>/dev/full": ("", 1),
    ">/dev/null 2>/dev/full": ("", 0),
    ">/dev/null <&-": (None, 0),
    "2>&1 >/dev/null | head -c 0": ("", 0),
}

#: Changes of the environment in which every command works.
ENVIRONMENTS = {
    "no home": {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "TMPDIR": "/proc/none"},
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "no locale": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}

HEAVY = ("generate -n 2 hi", "count-params demo")  # tests/hardening/test_streams.py has all commands, without imports


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which `vlm` is the command under test; a pipe fails if any of its commands does."""
    script = f"set -o pipefail; vlm() {{ '{sys.executable}' -m vlm_cli \"$@\"; }}; {command}"
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )


def check_streams(command: str, streams: str, folder: Path) -> None:
    words, code = STREAMS[streams]
    result = shell(f"vlm {command} {streams}", folder)
    assert result.returncode == code, result
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr
    if words is not None:
        message = "".join(line + "\n" for line in result.stderr.splitlines() if not line.startswith("Model "))
        assert message == words


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("command", "streams"),
    first_rows(
        [("list families", ">/dev/full"), *(("--help", x) for x in STREAMS), ("--version", ">/dev/full")], count=5
    ),
)
def test_broken_streams(tmp_path, command, streams):
    check_streams(command, streams, tmp_path)


@pytest.mark.attack
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("command", HEAVY[:1])
def test_broken_streams_of_a_command_that_imports_torch(tmp_path, command, streams):
    check_streams(command, streams, tmp_path)


@pytest.mark.parametrize("environment", first_of(ENVIRONMENTS))
def test_environments(tmp_path, environment):
    result = shell("vlm list families", tmp_path, **ENVIRONMENTS[environment])
    assert (result.returncode, result.stderr) == (0, "") and "flamingo" in result.stdout


@pytest.mark.attack
@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("command", HEAVY)
def test_environments_of_every_kind_of_command(tmp_path, command, environment):
    result = shell(f"vlm {command}", tmp_path, **ENVIRONMENTS[environment])
    assert result.returncode == 0 and "Error" not in result.stderr, result


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("command", "code", "words"),
    first_rows(
        [
            ("vlm --version", 0, ""),
            ("vlm list families", 1, "Was it deleted? Change to another one: cd ~"),
            ("vlm count-params demo", 1, "Was it deleted? Change to another one: cd ~"),
        ],
        2,
    ),
)
def test_a_working_directory_that_was_deleted(tmp_path, command, code, words):
    result = shell(f"mkdir gone; cd gone; rmdir ../gone; {command}", tmp_path)
    assert result.returncode == code and words in result.stderr and result.stderr.count("\n") == code


@pytest.mark.parametrize(
    ("command", "code", "words"),
    first_rows(
        [
            ("generate - <&-", 2, "no prompt is given"),
            ("generate - 0>file", 1, "cannot read standard input: Bad file descriptor"),
            ("batch - -o out.jsonl <&-", 2, "nothing is piped in"),
        ],
        1,
    ),
)
def test_broken_stdin(tmp_path, command, code, words):
    result = shell(f"vlm {command}", tmp_path)
    assert result.returncode == code and words in result.stderr and result.stderr.count("\n") == 1, result


#: Opens a file, and lets a library of C print on the numbers of stdout and stderr.
INTRUDER = """
import os
from vlm_cli.cli.standard_streams import open_streams
if {is_guarded}:
    open_streams()
with open("mine", "w") as file:
    for number in (1, 2):
        try:
            os.write(number, b"printed")
        except OSError:
            pass
    print("printed")
"""


@pytest.mark.sample(2)
@pytest.mark.parametrize("is_guarded", [True, False])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_no_stream_ends_up_in_another_file(tmp_path, closed, is_guarded):
    """The twin is a process without `open_streams`, whose file gets what was printed."""
    (tmp_path / "script.py").write_text(INTRUDER.format(is_guarded=is_guarded))
    shell(f"'{sys.executable}' script.py {closed}", tmp_path)
    assert ((tmp_path / "mine").read_bytes() == b"") == is_guarded
