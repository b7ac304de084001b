"""Long runs: neither the memory nor the open files of a process grow with the number of answers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.hardening.interrupting import Streams, run
from tests.hardening.subjects import Workshop

MAX_GROWTH = 48 * 2**20  # bytes, from the second quarter of a run to its last
MAX_FILES = 4  # open descriptors, likewise
ANSWERS, TURNS = 3000, 300


@dataclass
class Watch:
    """The memory and the open files of a process, in the order of time."""

    samples: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, pid: int) -> None:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            if files := len(os.listdir(f"/proc/{pid}/fd")):  # a process that ends has none
                self.samples.append((pages * os.sysconf("SC_PAGE_SIZE"), files))
        except (OSError, IndexError):
            return  # it has just ended

    def problems(self) -> list[str]:
        """Compare the second quarter of the run, when caches are full, with the last."""
        n = len(self.samples)
        early, late = self.samples[n // 4 : n // 2], self.samples[3 * n // 4 : -1]
        assert len(early) > 5 and len(late) > 5, f"only {n} samples"
        memory, files = (max(x[i] for x in late) - max(x[i] for x in early) for i in (0, 1))
        print(f"{n} samples; memory grew by {memory / 2**20:.1f} MB, open files by {files}")
        found = [f"memory grew by {memory / 2**20:.1f} MB"] if memory > MAX_GROWTH else []
        return found + ([f"{files} more files are open"] if files > MAX_FILES else [])


@pytest.mark.attack
def test_thousands_of_answers(shop: Workshop, tmp_path: Path) -> None:
    rows = [{"prompt": f"<image:{'abcdef'[i % 6]}.png>The {i % 97}", "id": i} for i in range(ANSWERS)]
    for name in "abcdef":
        (tmp_path / f"{name}.png").symlink_to(shop.folder / "images/a.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["batch", "rows.jsonl", "-m", str(shop.folder / "model"), "-o", "out.jsonl", "-n", "4", "-b", "8"]
    watch = Watch()
    ended = run([*words, "--workers", "0"], tmp_path, watch=watch, max_seconds=1200)
    assert ended.code == 0, ended.printed
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in answers] == list(range(ANSWERS)) and all("text" in row for row in answers)
    assert watch.problems() == []


@pytest.mark.attack
def test_hundreds_of_turns(shop: Workshop, tmp_path: Path) -> None:
    turns = [f"<image:{shop.folder}/images/a.png>Hi" if i % 30 == 0 else "Hi" for i in range(TURNS)]
    (tmp_path / "turns.txt").write_text("\n".join(turns) + "\n")
    words = ["chat", str(shop.folder / "model"), "-n", "2", "--json"]
    watch = Watch()
    ended = run(words, tmp_path, streams=Streams(stdin=str(tmp_path / "turns.txt")), watch=watch, max_seconds=1200)
    assert ended.code == 0, ended.printed[-1000:]
    assert ended.printed.count('"text"') == TURNS
    assert watch.problems() == []


# -- twins -------------------------------------------------------------------------------------------------------------


def is_steady() -> None:
    for _ in range(60):
        bytearray(10**6)
        time.sleep(0.03)


def leaks_memory() -> None:
    kept = []
    for _ in range(60):
        kept.append(bytearray(os.urandom(1)) * (4 * 2**20))
        time.sleep(0.03)


def leaks_files() -> None:
    for _ in range(60):
        os.dup(0)
        time.sleep(0.03)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("app", "found"), [(is_steady, ""), (leaks_memory, "memory grew"), (leaks_files, "more files")]
)
def test_a_leak_is_noticed(app: Callable[[], object], found: str, tmp_path: Path) -> None:
    watch = Watch()
    assert run([], tmp_path, app=app, watch=watch).code == 0
    problems = watch.problems()
    assert any(found in problem for problem in problems) if found else problems == []
