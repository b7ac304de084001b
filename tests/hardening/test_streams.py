"""Commands whose streams are full, closed, or pipes that nobody reads: one message or none, and the output whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hardening.attempt import TRACEBACK
from tests.hardening.interrupting import CAPTURED, CLOSED, NO_READER, Job, Streams, Whole, contents, run

NOWHERE, FULL = "/dev/null", "/dev/full"

pytestmark = pytest.mark.skipif(not Path(FULL).exists(), reason="this system has no /dev/full")

#: The streams; the exit code of a command that writes on stdout; and what stderr then says, in which it may say more.
BROKEN: dict[str, tuple[Streams, int, str]] = {
    "stdout full": (Streams(stdout=FULL), 1, "cannot write the output: No space left on device"),
    "stdout closed": (Streams(stdout=CLOSED), 1, "cannot write the output: Bad file descriptor"),
    "stdout not read": (Streams(stdout=NO_READER), 1, ""),
    "stderr full": (Streams(stdout=NOWHERE, stderr=FULL), 0, ""),
    "stderr closed": (Streams(stdout=NOWHERE, stderr=CLOSED), 0, ""),
    "stderr not read": (Streams(stdout=NOWHERE, stderr=NO_READER), 0, ""),
    "both full": (Streams(stdout=FULL, stderr=FULL), 1, ""),
    "both not read": (Streams(stdout=NO_READER, stderr=NO_READER), 1, ""),
    "stdin closed": (Streams(stdin=CLOSED), 0, ""),
    "all closed": (Streams(CLOSED, CLOSED, CLOSED), 1, ""),
}
WRITERS = ("build", "export", "train", "batch", "eval")
#: Commands that write no file. `chat` reads its turns from stdin.
READERS = {
    "generate": ["generate", "hi", "-n", "2"],
    "inspect": ["inspect", "demo"],
    "count-params": ["count-params", "demo"],
    "list": ["list", "families"],
    "doctor": ["doctor", "--help"],
    "help": ["--help"],
    "version": ["--version"],
    "chat": ["chat", "-n", "2"],
}
QUIET = ("batch",)  # writes its answers into a file, and nothing on stdout


@pytest.fixture
def job(request: pytest.FixtureRequest, jobs: dict[str, Job]) -> Job:
    name = request.param
    return jobs[name] if name in jobs else Job(name, READERS[name], outputs=())


def wrong(job: Job, whole: Whole, streams: str, folder: Path) -> list[str]:
    """Run a job with broken streams, and say what is wrong."""
    given, code, words = BROKEN[streams]
    if job.name == "chat" and given.stdin == NOWHERE:
        (folder.parent / "turns").write_text("hi\n")
        given = replace(given, stdin=str(folder.parent / "turns"))
    elif job.name == "chat":
        code = 2
    if job.name in QUIET and given.stdout != CAPTURED and given.stdin != CLOSED:
        code, words = 0, ""
    elif job.name in QUIET:
        code = 0
    ended = run(job.words, folder, streams=given)
    there = contents(folder, job.outputs)
    checks = {
        f"exit code {ended.code}": ended.code != code,
        "no words": words not in ended.printed,
        f"printed {ended.printed[-300:]!r}": TRACEBACK.search(ended.printed) or "Exception" in ended.printed,
        "half-written": bool(there) and there != whole.contents,
        "nothing written": ended.code == 0 and there != whole.contents,
    }
    return [name for name, is_wrong in checks.items() if is_wrong]


@pytest.mark.attack
@pytest.mark.parametrize("streams", BROKEN)
@pytest.mark.parametrize("job", [*WRITERS, *READERS], indirect=True)
def test_a_command_over_broken_streams(job: Job, whole: Callable[[str], Whole], streams: str, tmp_path: Path) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    assert wrong(job, whole(job.name) if job.outputs else Whole({}), streams, folder) == []


def prints_in_place() -> None:
    """A command that does not notice that its stdout is broken, and says so in Python's words."""
    try:
        print("x" * 100_000, flush=True)
    except Exception:
        import traceback

        traceback.print_exc()


def test_a_command_that_fails_in_pythons_words_is_caught(tmp_path: Path) -> None:
    ended = run([], tmp_path, streams=Streams(stdout=FULL), app=prints_in_place)
    assert "Traceback" in ended.printed
