"""Locks, renames that refuse to replace, and files that appear together."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.holder import HOLDER, Holder
from vlm_cli import files, locks, renames
from vlm_cli.errors import CheckpointError, OutputExistsError
from vlm_cli.files import replacing_directory, replacing_file, replacing_files, reserved_directory, reserved_files
from vlm_cli.locks import locked, open_locked
from vlm_cli.renames import move_back, move_over, move_to_new_name

PACKAGE = Path(files.__file__).parent


@pytest.fixture(params=["renameat2", "links", "neither"])
def system(request, monkeypatch):
    """Linux; a system that cannot refuse or exchange; and one that has no hard links either."""
    if request.param != "renameat2":
        monkeypatch.setattr(renames, "_rename_with_flag", lambda *arguments: False)
    if request.param == "neither":

        def link(*arguments, **keywords):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    return request.param


def make(path: Path, text: str, kind: str) -> Path:
    """A file, or a directory that vlm wrote, with a text in it."""
    if kind == "file":
        path.write_text(text)
    else:
        path.mkdir()
        (path / files.EXPORT_FILE).write_text(text)
    return path


def read(path: Path) -> str:
    return (path if path.is_file() else path / files.EXPORT_FILE).read_text()


# -- renames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_new_name_must_be_free(tmp_path, system, kind):
    source = make(tmp_path / "new", "new", kind)
    for taken in (make(tmp_path / "taken", "old", kind), tmp_path / "link"):
        if taken.name == "link":
            taken.symlink_to("nowhere")
        with pytest.raises(FileExistsError):
            move_to_new_name(source, taken)
    assert read(tmp_path / "taken") == "old" and os.readlink(tmp_path / "link") == "nowhere"
    move_to_new_name(source, tmp_path / "free")
    assert read(tmp_path / "free") == "new" and not source.exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_replaced_gets_the_other_name(tmp_path, system, kind):
    new, old = make(tmp_path / "new", "new", kind), make(tmp_path / "old", "old", kind)
    move_over(new, old)
    assert read(old) == "new"
    if kind == "directory" or system == "renameat2":
        assert read(new) == "old"
        move_back(new, old)
        assert (read(new), read(old)) == ("new", "old")
    assert len(list(tmp_path.iterdir())) == (2 if new.exists() else 1)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_name_is_never_without_what_it_names(tmp_path, kind):
    """While two names are exchanged again and again, a reader always finds one of the two directories."""
    new, old = make(tmp_path / "new", "new", kind), make(tmp_path / "old", "old", kind)
    if not renames._rename_with_flag(new, old, renames._EXCHANGE):
        pytest.skip("this system cannot exchange two names")
    over = threading.Event()

    def exchange() -> None:
        while not over.is_set():
            move_over(new, old)

    writer = threading.Thread(target=exchange)
    writer.start()
    try:
        assert all(os.path.exists(old) for _ in range(20_000))
    finally:
        over.set()
        writer.join()


def test_every_rename_of_the_package_is_deliberate():
    """Renaming replaces in silence. New code calls `vlm_cli.files`, or stands here with its reason."""
    known = {
        "renames.py",
        "checkpoint/downloads.py",  # a cached file, checked by its hash: whoever downloads it writes the same bytes
        "cli/history.py",  # the last lines of vlm's own file
        "training/best.py",  # inside the folder of a run, too
        "training/features.py",  # named by a hash of what it holds: whoever writes it writes the same bytes
        "training/checkpoints.py",  # inside the folder of a run, which the run has locked
        "sweeps/performing.py",  # the same, of a run of a sweep
    }
    words = ("os.rename(", "os.replace(", "os.renames(", "shutil.move(", ".rename(")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in words)
    }
    assert found == known


# -- what appears during the work --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "directory", "empty directory", "link"])
def test_what_appears_at_out_stays(tmp_path, system, kind):
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError, match="appeared while vlm was working"), replacing_directory(out) as partial:
        (partial / "model").write_text("mine")
        if kind == "empty directory":
            out.mkdir()
        elif kind == "link":
            out.symlink_to("nowhere")
        else:
            make(out, "theirs", kind)
    assert os.listdir(tmp_path) == ["out"]
    assert kind in ("empty directory", "link") or read(out) == "theirs"


def test_overwriting_checks_again_at_the_end(tmp_path, system):
    out = make(tmp_path / "out", "old", "directory")
    with (
        pytest.raises(OutputExistsError, match="is not a directory that vlm wrote"),
        replacing_directory(out, overwrite=True),
    ):
        (out / files.EXPORT_FILE).rename(out / "letters.txt")
    assert (out / "letters.txt").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_what_comes_between_the_last_check_and_the_rename_comes_back(tmp_path, monkeypatch):
    out = make(tmp_path / "out", "old", "directory")
    original = files.move_over

    def late(source, target):
        if (target / files.EXPORT_FILE).exists() and read(target) == "old":
            (target / files.EXPORT_FILE).rename(target / "letters.txt")
        original(source, target)

    monkeypatch.setattr(files, "move_over", late)
    with pytest.raises(OutputExistsError), replacing_directory(out, overwrite=True) as partial:
        (partial / files.EXPORT_FILE).write_text("new")
    assert (out / "letters.txt").read_text() == "old" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("target", ["directory", "link"])
def test_overwriting_leaves_nothing_beside(tmp_path, system, target):
    out = tmp_path / "out"
    old = make(tmp_path / ("out" if target == "directory" else "old"), "old", "directory")
    if target == "link":
        out.symlink_to(old)
    with replacing_directory(out, overwrite=True) as partial:
        (partial / files.EXPORT_FILE).write_text("new")
    assert read(out) == "new" and not out.is_symlink()
    assert sorted(os.listdir(tmp_path)) == (["out"] if target == "directory" else ["old", "out"])
    assert read(old) == ("new" if target == "directory" else "old")


def test_a_file_that_appears_stays(tmp_path, system):
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError, match="appeared"), replacing_file(out) as file:
        file.write("mine")
        out.write_text("theirs")
    assert out.read_text() == "theirs" and os.listdir(tmp_path) == ["out"]


# -- several files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_appear_together_or_not_at_all(tmp_path, monkeypatch, overwrite):
    first, second = tmp_path / "a", tmp_path / "b"
    if overwrite:
        first.write_text("old")
    name = "move_over" if overwrite else "move_to_new_name"
    original = getattr(files, name)

    def fail(source, target):
        if target == second:
            raise OSError(errno.EIO, "Input/output error")
        original(source, target)

    monkeypatch.setattr(files, name, fail)
    with (
        pytest.raises(CheckpointError, match="Nothing was changed"),
        replacing_files([first, second], overwrite=overwrite) as opened,
    ):
        for file in opened:
            file.write("new")
    assert os.listdir(tmp_path) == (["a"] if overwrite else [])
    assert not overwrite or first.read_text() == "old"
    monkeypatch.undo()  # the twin: they appear
    with replacing_files([first, second], overwrite=overwrite) as opened:
        for file in opened:
            file.write("new")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and first.read_text() == second.read_text() == "new"


# -- locks ------------------------------------------------------------------------------------------------------------


def test_a_lock_keeps_another_process_away_and_leaves_no_litter(tmp_path):
    out = tmp_path / "out"
    holder = Holder(out)
    for reserve in (reserved_directory(out), replacing_directory(out), reserved_files([out]), locked(out)):
        with pytest.raises(OutputExistsError, match=f"being written by another vlm, process {holder.process.pid} on "):
            reserve.__enter__()
    with locked(tmp_path / "other"):
        pass
    holder.end()
    assert os.listdir(tmp_path) == []
    with reserved_directory(out) as is_exclusive:
        assert is_exclusive and os.listdir(tmp_path) == [".out.lock"]
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run([sys.executable, "-c", HOLDER, str(out)], check=True, capture_output=True)
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    holder = Holder(tmp_path / "out")
    holder.end(kill=True)
    assert os.listdir(tmp_path) == [".out.lock"]
    with locked(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_thread_locks_again_and_another_thread_does_not(tmp_path):
    out, found = tmp_path / "out", []

    def enter() -> None:
        try:
            with locked(Path(os.path.relpath(out))):
                found.append("entered")
        except OutputExistsError as error:
            found.append(str(error))

    with locked(out), locked(out):
        other = threading.Thread(target=enter)
        other.start()
        other.join()
    assert "being written by another thread of this process" in found[0]
    enter()
    assert found[1:] == ["entered"] and os.listdir(tmp_path) == []


def test_a_forked_process_leaves_the_lock_alone(tmp_path):
    with locked(tmp_path / "out"):
        child = os.fork()
        if not child:
            try:
                with locked(tmp_path / "out"):
                    os._exit(0)  # it got the lock
            except OutputExistsError:
                os._exit(7)
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert os.listdir(tmp_path) == [".out.lock"]


def test_a_file_that_was_removed_before_it_could_be_locked_is_opened_again(tmp_path, monkeypatch):
    """Between opening and locking, the process that had the lock removed the file, and a third one made a new file."""
    path, original, times = tmp_path / "file", locks._lock, []

    def slow(file):
        if not times:
            path.unlink()
        times.append(1)
        return original(file)

    monkeypatch.setattr(locks, "_lock", slow)
    with open_locked(path) as file:
        assert os.path.samestat(os.fstat(file.fileno()), path.stat()) and len(times) == 2


def test_without_locks_the_rename_refuses(tmp_path, monkeypatch):
    import fcntl

    def lockf(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    out = tmp_path / "out"
    with reserved_directory(out) as is_exclusive:
        assert not is_exclusive
        with pytest.raises(OutputExistsError, match="appeared"), replacing_directory(out):
            make(out, "theirs", "directory")
    assert read(out) == "theirs" and os.listdir(tmp_path) == ["out"]


def test_a_file_of_somebody_with_the_name_of_a_lock_stays(tmp_path):
    lock = tmp_path / ".out.lock"
    lock.write_text("my letters")
    with pytest.raises(OutputExistsError, match="is not a lock that vlm wrote"), locked(tmp_path / "out"):
        pass
    assert lock.read_text() == "my letters"
    lock.unlink()
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"cannot write '\.out\.lock' beside"), locked(tmp_path / "out"):
        pass
    assert not (tmp_path / "elsewhere").exists()
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(CheckpointError, match="it is not a file"), locked(tmp_path / "out"):
        pass


def test_a_long_name_has_a_lock(tmp_path):
    out = tmp_path / ("ä" * 120)
    with replacing_directory(out) as partial:
        (partial / "model").write_text("new")
    assert os.listdir(tmp_path) == [out.name]


# -- leftovers of killed processes -------------------------------------------------------------------------------------


def test_the_next_run_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    killed = [".out.abcd_123.partial", ".out.00000000.partial.zzzzzzzz.old"]
    others = [
        ".out.partial",
        ".out.other.abcd_123.partial",
        ".out.ABCD_123.partial",
        "out.abcd_123.partial",
        ".out.x.old",
    ]
    for name in [*killed, *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with replacing_directory(tmp_path / "out") as partial:
        (partial / "new").touch()
        assert partial.exists() and not any((tmp_path / name).exists() for name in killed)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "out"])


def test_files_that_a_killed_run_left_go_too(tmp_path: Path) -> None:
    (tmp_path / ".out.abcd_123.partial").touch()
    with reserved_files([tmp_path / "out"]):
        assert not (tmp_path / ".out.abcd_123.partial").exists()


def test_an_old_output_that_stood_aside_when_the_process_was_killed_gets_its_name_back(tmp_path: Path) -> None:
    aside = tmp_path / ".out.abcd_123.partial.zzzzzzzz.old" / "old"
    aside.mkdir(parents=True)
    (aside / "mine").touch()
    (tmp_path / ".out.abcd_123.partial").mkdir()
    with pytest.raises(OutputExistsError, match="exists"), replacing_directory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out/mine").exists()


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    start, end = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(tmp_path / "out", end))
    process.start()
    start.recv()
    with pytest.raises(OutputExistsError, match="being written"), replacing_directory(tmp_path / "out"):
        pass
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    with replacing_directory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _write_slowly(out: Path, ready: Any) -> None:
    with replacing_directory(out):
        ready.send("")
        time.sleep(60)
