"""Each judge of the attack notices what it is for: fake commands that do what no command may do."""

from __future__ import annotations

import ctypes
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.hardening import mutate
from tests.hardening.attempt import Attempt, Limits, Outcome, faults, run_all
from tests.hardening.mutate import ESCAPE, PLANTED_PATHS

LIMITS = Limits(seconds=0.5, bytes=64 * 2**20)


def answers(words: Sequence[str]) -> int:
    """What an honest command does."""
    print("an answer")
    print("a note", file=sys.stderr)
    return 0


def hangs(words: Sequence[str]) -> int:
    time.sleep(60)
    return 0


def is_slow(words: Sequence[str]) -> int:
    started = time.process_time()
    while time.process_time() < started + 0.55:
        pass
    return 0


def raises(words: Sequence[str]) -> int:
    raise ValueError("nobody catches this")


def dies(words: Sequence[str]) -> int:
    ctypes.string_at(0)
    return 0


def fills_memory(words: Sequence[str]) -> int:
    bytearray(os.urandom(1)) * (200 * 2**20)
    return 0


def runs_out_of_memory(words: Sequence[str]) -> int:
    print("Error: MemoryError", file=sys.stderr)
    return 1


def escapes_on_stdout(words: Sequence[str]) -> int:
    print(f"the tensor {ESCAPE}")
    return 0


def escapes_on_stderr(words: Sequence[str]) -> int:
    print("\x9b31m", file=sys.stderr)
    return 1


def escapes_past_python(words: Sequence[str]) -> int:
    os.write(2, ESCAPE.encode())
    return 0


def panics(words: Sequence[str]) -> int:
    os.write(2, b"thread '<unnamed>' panicked at src/lib.rs:1:1")
    return 1


def is_a_surprise(words: Sequence[str]) -> int:
    print(
        "Error: TypeError: object of type 'NoneType' has no len(). Run `vlm --debug …` to see where.", file=sys.stderr
    )
    return 1


def has_another_code(words: Sequence[str]) -> int:
    print("Error", file=sys.stderr)
    return 3


def is_silent(words: Sequence[str]) -> int:
    return 1


def asks_and_runs_code(words: Sequence[str]) -> int:
    if input("Do you wish to run the custom code? [y/N]") == "y":
        Path(os.environ["PLANTED"]).touch()
    return 0


def connects(words: Sequence[str]) -> int:
    with socket.socket() as connection:
        connection.connect_ex(("127.0.0.1", 9))
    return 0


def starts_a_process(words: Sequence[str]) -> int:
    os.system("true")
    return 0


def opens_a_device(words: Sequence[str]) -> int:
    open(PLANTED_PATHS[0]).close()
    return 0


def tells_what_a_file_holds(words: Sequence[str]) -> int:
    Path("out.jsonl").write_text("is not an image: it begins with b'root:x:0:0'")
    return 0


def answers_something_else(words: Sequence[str]) -> int:
    print("another answer")
    return 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_all([Attempt("whole", [["words"]], tmp_path_factory.mktemp("whole"))], answers)[0]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("command", "found"),
    [
        (hangs, "hang"),
        (is_slow, "hang"),
        (raises, "code 99"),
        (raises, "traceback"),
        (dies, "died"),
        (fills_memory, "memory"),
        (runs_out_of_memory, "memory"),
        (escapes_on_stdout, "escape"),
        (escapes_on_stderr, "escape"),
        (escapes_past_python, "escape"),
        (panics, "traceback"),
        (is_a_surprise, "unforeseen"),
        (has_another_code, "code 3"),
        (is_silent, "no words"),
        (asks_and_runs_code, "ran"),
        (connects, "reached"),
        (starts_a_process, "reached"),
        (opens_a_device, "opened"),
        (tells_what_a_file_holds, "leak"),
        (answers_something_else, "silent"),
    ],
)
def test_a_bad_command_is_caught(
    command: Callable[[Sequence[str]], int], found: str, whole: Outcome, tmp_path: Path
) -> None:
    attempt = Attempt("bad", [["words"]], tmp_path, result=tmp_path / "out.jsonl")
    (outcome,) = run_all([attempt], command, LIMITS)
    assert any(fault.startswith(found) for fault in faults(attempt, outcome, whole, LIMITS)), outcome


def test_an_honest_command_passes(whole: Outcome, tmp_path: Path) -> None:
    attempt = Attempt("honest", [["words"], ["words"]], tmp_path)
    (outcome,) = run_all([attempt], answers, LIMITS)
    assert outcome.stdout == "an answer\nan answer\n" and outcome.stderr == "a note\na note\n"
    twice = Outcome(stdout=outcome.stdout)
    assert faults(attempt, outcome, twice, LIMITS) == []


def test_another_answer_is_no_fault_where_a_reason_or_a_note_is_given(whole: Outcome, tmp_path: Path) -> None:
    changed = Outcome(stdout="another answer\n")
    assert faults(Attempt("x", [], tmp_path), changed, whole) == ["silent"]
    assert faults(Attempt("x", [], tmp_path, another_answer="a pixel changed"), changed, whole) == []
    changed.stderr = "Note: somebody changed config.json.\n"
    assert faults(Attempt("x", [], tmp_path), changed, whole) == []


def test_a_case_after_a_death_runs(whole: Outcome, tmp_path: Path) -> None:
    def dies_if_told(words: Sequence[str]) -> int:
        return dies(words) if words[0] == "die" else answers(words)

    attempts = [Attempt(word, [[word]], tmp_path) for word in ("live", "die", "live", "die", "live")]
    ends = [outcome.end for outcome in run_all(attempts, dies_if_told, LIMITS)]
    assert ends == ["done", "status -11", "done", "status -11", "done"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("how", [mutate.image, mutate.json_file, mutate.yaml_file, mutate.safetensors, mutate.lines])
def test_a_seed_names_a_case_for_ever(how: Callable[[random.Random, bytes], mutate.Mutation]) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(4) if how is mutate.safetensors else header
    found = [how(random.Random(f"seed {i}"), data) for i in range(50)]
    assert found == [how(random.Random(f"seed {i}"), data) for i in range(50)]
    assert len({mutation.data for mutation in found}) > 10
