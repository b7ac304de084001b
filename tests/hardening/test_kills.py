"""Kill commands that write, and fill their disks: nothing is half-written, and the next run ends as if nothing was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hardening.interrupting import (
    CODES,
    Job,
    Moment,
    Whole,
    contents,
    interrupted,
    names,
    on_a_full_disk,
    run,
)
from tests.support.grid import first_of
from vlm_cli.checkpoint import downloads
from vlm_cli.files import replacing_directory, replacing_files, reserved_directory, reserved_files
from vlm_cli.interrupt import at_signal
from vlm_cli.renames import remove_tree

SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
COMMANDS = ["build", "export", "train", "batch"]
KILLS = 26  # of each command in the long tests
COLD_SECONDS = 4.0  # for the imports of a new interpreter


def kill(job: Job, whole: Whole, number: signal.Signals, seed: str, folder: Path, text: str = "") -> list[str]:
    """Kill a job at a random moment, or shortly after it has printed a text; give what is wrong, with the seed."""
    most = 0.03 if text else 1.1 * whole.seconds
    moment = Moment(random.Random(seed).uniform(0, most), text)
    place = folder / "place"
    place.mkdir()
    found = interrupted(job, whole, place, number, moment)
    shutil.rmtree(place)
    return [f"{seed}, {number.name} {moment} of {whole.seconds:.3f} s: {problem}" for problem in found]


@pytest.mark.matrix
@pytest.mark.parametrize("name", first_of(COMMANDS))
def test_a_run_that_is_killed_once(
    name: str, jobs: dict[str, Job], whole: Callable[[str], Whole], hardening_seed: int, tmp_path: Path
) -> None:
    number = SIGNALS[(hardening_seed + COMMANDS.index(name)) % 3]
    assert kill(jobs[name], whole(name), number, f"{name} {hardening_seed}", tmp_path) == []


@pytest.mark.attack
@pytest.mark.parametrize("name", [*COMMANDS, "eval"])
def test_runs_that_are_killed_at_random_moments(
    name: str, jobs: dict[str, Job], whole: Callable[[str], Whole], hardening_seed: int, tmp_path: Path
) -> None:
    wrong: list[str] = []
    for i in range(KILLS):
        wrong += kill(jobs[name], whole(name), SIGNALS[i % 3], f"{name} {hardening_seed} {i}", tmp_path)
    print(f"{name}, seed {hardening_seed}: {KILLS} kills, {len(wrong)} wrong")
    assert not wrong, f"{len(wrong)} of {KILLS} kills went wrong:\n" + "\n".join(wrong)


#: What each command prints while it works: at these lines it begins something else.
TEXTS = {
    "build": ["composing", "loading", "writing"],
    "export": ["reading", "loading", "exporting"],
    "train": ["loading", "reading", "Training", "writing"],
    "batch": ["Model"],
    "eval": ["items from", "Model", "items in"],
}
#: The steps of a training run; after each second one it measures the held-out loss and saves a checkpoint.
TEXTS["train"] += [f"step {i}/6  loss" for i in range(1, 7)] + [f"step {i}/6  eval" for i in (2, 4, 6)]


@pytest.mark.attack
@pytest.mark.parametrize("name", COMMANDS)
def test_programs_that_are_killed_from_outside(
    name: str, jobs: dict[str, Job], whole: Callable[[str], Whole], hardening_seed: int, tmp_path: Path
) -> None:
    """A new interpreter, as a shell starts it: most of its time it imports torch and Transformers."""
    wrong: list[str] = []
    for number in SIGNALS:
        rng = random.Random(f"{name} {hardening_seed} {number}")
        moment = Moment(rng.uniform(0, COLD_SECONDS + whole(name).seconds))
        place = tmp_path / number.name
        place.mkdir()
        found = interrupted(jobs[name], whole(name), place, number, moment, is_cold=True)
        wrong += [f"{number.name} {moment}: {problem}" for problem in found]
    assert not wrong, "\n".join(wrong)


@pytest.mark.attack
@pytest.mark.parametrize("name", [*COMMANDS, "eval"])
def test_runs_that_are_killed_at_a_line(
    name: str, jobs: dict[str, Job], whole: Callable[[str], Whole], hardening_seed: int, tmp_path: Path
) -> None:
    wrong: list[str] = []
    for i, text in enumerate(TEXTS[name]):
        assert text in whole(name).printed
        # SIGINT at each line, since it lets a step of the training end; the others at some lines.
        for number in {signal.SIGINT, SIGNALS[(i + hardening_seed) % 3]}:
            wrong += kill(jobs[name], whole(name), number, f"{name} {hardening_seed} {text}", tmp_path, text)
    assert not wrong, f"{len(wrong)} went wrong:\n" + "\n".join(wrong)


# -- each moment at which the disk changes -----------------------------------------------------------------------------


def writes_a_directory() -> None:
    with replacing_directory(Path("out")) as partial:
        (partial / "weights").write_text("x")
    Path("done").touch()


def writes_two_files() -> None:
    with reserved_files([Path("out"), Path("table")]), replacing_files([Path("out"), Path("table")]) as files:
        for file in files:
            file.write("x")
    Path("done").touch()


def leaves_a_moment() -> None:
    """A command that makes a directory first, and only then says who removes it."""
    with reserved_directory(Path("out")):
        folder = Path(tempfile.mkdtemp(dir="."))
        with at_signal(lambda: remove_tree(folder)):
            os.mkdir(folder / "inner")
            os.rename(folder, "out")
    Path("done").touch()


def left_at_each_change(app: Callable[[], object], number: signal.Signals, folder: Path) -> tuple[int, set[str]]:
    """Send a signal right after the first change of the disk, after the second, …: until the command ends before it.

    Returns:
        How many changes there are, and the names that a signal left.
    """
    left: set[str] = set()
    for k in range(1000):
        place = folder / str(k)
        place.mkdir()
        ended = run([], place, app=app, prepare=lambda k=k: _signal_after(k, number))  # type: ignore[misc]
        if ended.code == 0:
            assert names(place) >= {"out", "done"}
            return k, left
        assert ended.code == CODES[number], ended.printed
        left |= names(place) - {"out", "table", "done"}
        assert ("out" in names(place)) >= ("table" in names(place)) or app is not writes_two_files
    raise AssertionError("the command does not end")


def _signal_after(k: int, number: signal.Signals) -> None:
    """Let this process get a signal after its `k`-th change of the disk, before the call that makes it returns."""
    count = 0

    def watched(call: Callable[..., object]) -> Callable[..., object]:
        def then_signal(*args: object, **keywords: object) -> object:
            nonlocal count
            result = call(*args, **keywords)
            count += 1
            if count == k + 1:
                os.kill(os.getpid(), number)
            return result

        return then_signal

    for name in ("mkdir", "open", "link", "unlink", "rmdir", "rename", "replace"):
        setattr(os, name, watched(getattr(os, name)))


@pytest.mark.matrix
@pytest.mark.parametrize("number", first_of([signal.SIGTERM, signal.SIGINT]))
@pytest.mark.parametrize("app", [writes_a_directory, writes_two_files])
def test_a_signal_at_each_change_of_the_disk(app: Callable[[], object], number: signal.Signals, tmp_path: Path) -> None:
    changes, left = left_at_each_change(app, number, tmp_path)
    assert changes > 3 and left == set()


@pytest.mark.matrix
def test_a_moment_at_which_something_is_left_is_found(tmp_path: Path) -> None:
    assert left_at_each_change(leaves_a_moment, signal.SIGTERM, tmp_path)[1]


class EndlessDownload:
    """An answer of a server, during whose second block a signal arrives."""

    length = None
    blocks = 0

    def __enter__(self) -> EndlessDownload:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        self.blocks += 1
        if self.blocks == 2:
            signal.raise_signal(signal.SIGTERM)
        return b"x" * size


def downloads_weights() -> None:
    with downloads.downloaded("https://example.com/weights.pt", key="a hash", most=2**40):
        pass


def test_a_download_that_a_signal_ends_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(downloads, "open_url", lambda *args, **keywords: EndlessDownload())
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    ended = run([], tmp_path, app=downloads_weights)
    assert ended.code == CODES[signal.SIGTERM], ended.printed
    folder = tmp_path / "vlm" / "backbones"
    assert folder.is_dir() and names(folder) == set()


# -- full disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", first_of(["batch", *sorted({*COMMANDS, "eval"} - {"batch"})]))
def test_a_full_disk(
    name: str, jobs: dict[str, Job], whole: Callable[[str], Whole], hardening_seed: int, tmp_path: Path
) -> None:
    limit = random.Random(f"{name} {hardening_seed}").choice([0, 100, 1000, 10_000])
    tmp_path = tmp_path / "place"
    tmp_path.mkdir()
    assert on_a_full_disk(jobs[name], whole(name), tmp_path, limit) == []


@pytest.mark.attack
@pytest.mark.parametrize("limit", [0, 1, 200, 500, 1000, 5000, 20_000, 100_000, 500_000, 1_000_000])
@pytest.mark.parametrize("name", [*COMMANDS, "eval"])
def test_full_disks(name: str, jobs: dict[str, Job], whole: Callable[[str], Whole], limit: int, tmp_path: Path) -> None:
    tmp_path = tmp_path / "place"
    tmp_path.mkdir()
    assert on_a_full_disk(jobs[name], whole(name), tmp_path, limit) == []


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of a given size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.attack
@pytest.mark.parametrize(
    ("name", "small_disk"),
    [(name, "8k" if name == "batch" else "64k") for name in (*COMMANDS, "eval")],
    indirect=["small_disk"],
)
def test_a_small_file_system(name: str, jobs: dict[str, Job], small_disk: Path) -> None:
    ended = run(jobs[name].words, small_disk)
    there = names(small_disk) - set(jobs[name].kept)
    is_told = any(words in ended.printed for words in ("No space left on device", "as on a full disk"))
    assert ended.code == 1 and is_told and not there, ended
    assert "Traceback" not in ended.printed


# -- twins -------------------------------------------------------------------------------------------------------------


def overwrites() -> None:
    """A command that writes its file in place, slowly."""
    with open("out", "w") as file:
        for i in range(20):
            file.write(f"{i}\n")
            file.flush()
            time.sleep(0.01)


def swallows() -> None:
    """A command that goes on after the first signal, and prints what Python says of it."""

    def note(number: int, frame: object) -> None:
        print("Exception ignored in: <function f>", flush=True)

    signal.signal(signal.SIGTERM, note)
    time.sleep(0.3)
    Path("out").write_text("done")


def has_no_handler() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    leaves_files()


def leaves_files() -> None:
    Path(f"temporary-{os.getpid()}").touch()
    time.sleep(0.2)
    Path("out").write_text("done")


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("app", "number", "found"),
    [
        (overwrites, signal.SIGKILL, "half-written"),
        (swallows, signal.SIGTERM, "printed"),
        (leaves_files, signal.SIGKILL, "left"),
        (has_no_handler, signal.SIGTERM, "exit code -15"),
    ],
)
def test_a_bad_command_is_caught(app: Callable[[], object], number: signal.Signals, found: str, tmp_path: Path) -> None:
    job = Job("fake", [])
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run([], tmp_path / "whole", app=app).code == 0
    whole = Whole(contents(tmp_path / "whole", ["out"]), {"out"}, 0.2)
    problems = interrupted(job, whole, tmp_path / "killed", number, Moment(0.1), app)
    assert any(problem.startswith(found) for problem in problems), problems
    assert any("the next run" in problem for problem in problems) == (app in (leaves_files, has_no_handler))


def prints_steps() -> None:
    for i in range(3):
        print(f"step {i}", flush=True)
        time.sleep(0.1)
    Path("out").write_text("done")


@pytest.mark.matrix
@pytest.mark.parametrize(("text", "code"), [("step 1", -signal.SIGKILL), ("step 9", 0)])
def test_a_signal_is_sent_at_a_line(text: str, code: int, tmp_path: Path) -> None:
    ended = run([], tmp_path, app=prints_steps, interrupt=(signal.SIGKILL, Moment(text=text)))
    assert ended.code == code and ("step 2" in ended.printed) == (code == 0)


def test_rows_that_are_lost_are_noticed() -> None:
    from tests.hardening.interrupting import _is_beginning

    rows = [b"00ff " + json.dumps({"id": i}).encode() + b"\n" for i in range(4)]
    assert _is_beginning(b"{}\n" + b"".join(rows)) and _is_beginning(b"{}\n" + rows[0] + rows[1][:3])
    assert not _is_beginning(b"{}\n" + rows[0] + rows[2]) and not _is_beginning(b"{}\n" + rows[0] * 2)
