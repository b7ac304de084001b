"""What a user types in a chat: the history file, and what Tab completes."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.support.screens import on_a_terminal
from vlm_cli.cli.chat_completion import complete_line
from vlm_cli.cli.history import History

COMMANDS = {"image": "FILE", "system": "TEXT", "save": "FILE", "clear": ""}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("cat.png", "my cat.png", "my dog.png", ".hidden.png", "a>b.png", "evil\x1b[31m.png"):
        (tmp_path / name).touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("/", ["/image ", "/system ", "/save ", "/clear"]),
        ("/s", ["/system ", "/save "]),
        ("/image c", ["/image cat.png"]),
        ("/save my c", ["/save my cat.png"]),
        ("/image  p", ["/image  photos/"]),
        ("/image photos/", ["/image photos/one.png"]),
        ("/image ", [f"/image {name}" for name in ("a>b.png", "cat.png", "my cat.png", "my dog.png", "photos/")]),
        ("/image .h", ["/image .hidden.png"]),
        ("/image nowhere/x", []),
        ("/system c", []),
        ("Look: <image:c", ["Look: <image:cat.png"]),
        ("<image:cat.png> and <video:photos/o", ["<image:cat.png> and <video:photos/one.png"]),
        ("<image:a", []),
        ("<image:cat.png> c", []),
        ("c", []),
        ("The /s", []),
    ],
)
def test_tab_completes_commands_and_files(folder: Path, line: str, offered: list[str]) -> None:
    start, found = complete_line(line, COMMANDS)
    assert [line[:start] + text for text in found] == offered


def test_a_path_begins_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert complete_line("/image ~/ca", COMMANDS) == (7, ["~/cat.png"])


# -- the history -------------------------------------------------------------------------------------------------------


def test_the_history_is_the_users_alone(tmp_path: Path) -> None:
    history = History(tmp_path / "state" / "vlm" / "chat_history")
    assert history.read() == []
    for line in ("The cat", "ümlaut \udc80", "/image a.png"):
        history.add(line)
    assert History(history.path).read() == ["The cat", "ümlaut ?", "/image a.png"]
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.path.parent.stat().st_mode) == 0o700


def test_the_history_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text("".join(f"line {i}\n" for i in range(2500)))
    assert History(path).read() == [f"line {i}" for i in range(1500, 2500)]
    assert path.read_text().count("\n") == 1000 and stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("x" * (2 << 20) + "\nThe cat\n")
    assert History(path).read() == ["The cat"] and path.read_text() == "The cat\n"
    assert list(tmp_path.iterdir()) == [path]


def test_the_environment_says_where_the_history_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place() -> Path | None:
        history = History.of_user()
        return history and history.path

    monkeypatch.delenv("VLM_HISTORY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for state in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert place() == tmp_path / ".local/state/vlm/chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert place() == tmp_path / "state/vlm/chat_history"
    monkeypatch.setenv("VLM_HISTORY", "~/mine")
    assert place() == tmp_path / "mine"
    monkeypatch.setenv("VLM_HISTORY", "")
    assert place() is None


def test_a_history_that_cannot_be_kept_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    history = History(tmp_path / "file" / "history")
    history.read()
    history.add("The cat")
    history.add("The dog")
    assert capsys.readouterr().err.count("no history is kept, since") == 1


# -- a real terminal ---------------------------------------------------------------------------------------------------

PROGRAM = """
from itertools import islice
from vlm_cli.cli import terminal
from vlm_cli.cli.chat_completion import complete_line
from vlm_cli.cli.history import History
from vlm_cli.cli.line_editor import LineEditor
terminal.guard_streams()
editor = LineEditor(lambda line: complete_line(line, {"image": "FILE"}), History.of_user())
print([entry.text for entry in islice(editor.entries(), 3)])
"""


def test_a_terminal_edits_completes_and_remembers(
    folder: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path = folder / "history"
    path.write_text("an earlier line\n")
    keys = b"/im\tmy c\t\n<image:pho\tone.png>x\n\x1b[A\x1b[A\x1b[A\n"
    shown = on_a_terminal(["-c", PROGRAM], environment | {"VLM_HISTORY": str(path)}, keys)
    assert "['/image my cat.png', '<image:photos/one.png>x', 'an earlier line']" in shown
    assert path.read_text().split("\n")[1:] == ["/image my cat.png", "<image:photos/one.png>x", "an earlier line", ""]
