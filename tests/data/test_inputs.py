"""Inputs that can be read once: pipes, /dev/stdin and `-`."""

from __future__ import annotations

import io
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.training import write
from vlm_cli.data.inputs import base_folder, is_pipe, read_bytes, read_lines
from vlm_cli.data.records import read_records
from vlm_cli.errors import UsageError


def pipe(tmp_path: Path, data: bytes) -> Path:
    """A named pipe into which a thread writes once."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=[data], daemon=True).start()
    return path


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes, *, is_terminal: bool = False) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: is_terminal))


def test_paths_in_a_pipe_start_at_the_working_directory(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [])
    assert (base_folder(file), is_pipe(file)) == (tmp_path, False)
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("-"), Path("/dev/stdin"), Path("/dev/fd/63"), tmp_path / "pipe"):
        assert (base_folder(path), is_pipe(path)) == (Path(), True)
    assert not is_pipe(tmp_path / "gone") and not is_pipe(tmp_path)


def test_records_are_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    expected = read_records(folder / "train.jsonl")
    raw = (folder / "train.jsonl").read_bytes()
    piped = read_records(pipe(tmp_path, raw))
    stdin(monkeypatch, raw)
    for found in (piped, read_records(Path("-"))):
        assert [record.segments for record in found.good] == [record.segments for record in expected.good]
        assert (found.sha256, found.problems) == (expected.sha256, [])


def test_stdin_is_read_as_a_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"one\ntwo")
    assert read_bytes(Path("-")) == b"one\ntwo"
    stdin(monkeypatch, b"one\ntwo")
    assert list(read_lines(Path("-"))) == [b"one\n", b"two"]
    stdin(monkeypatch, b"", is_terminal=True)
    with pytest.raises(UsageError, match="nothing is piped in"):
        list(read_lines(Path("-")))
