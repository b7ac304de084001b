"""`History`: the lines that a user typed in earlier chats, in a file that nobody else may read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vlm_cli.cli import console

__all__ = ["SETTING", "History"]

SETTING = "VLM_HISTORY"  # the environment variable that names another file, or none
_MOST_LINES = 1000
_MOST_BYTES = 1 << 20  # of the file's end that are read


class History:
    """The history file. If it cannot be read or written, a note says so, once, and the chat goes on without it.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_kept = True

    @classmethod
    def of_user(cls) -> History | None:
        """Return the history in the user's folder for such files, or where VLM_HISTORY says; None if that is empty."""
        chosen = os.environ.get(SETTING)
        if chosen is not None:
            return cls(Path(os.path.expanduser(chosen))) if chosen else None
        state = Path(os.environ.get("XDG_STATE_HOME", ""))  # https://specifications.freedesktop.org/basedir-spec
        folder = state if state.is_absolute() else Path(os.path.expanduser("~/.local/state"))
        return cls(folder / "vlm" / "chat_history") if folder.is_absolute() else None  # a user may have no home

    def read(self) -> list[str]:
        """Return the last lines, the oldest first; shorten a file that has grown long."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _MOST_BYTES))
                lines = file.read().decode(errors="replace").split("\n")[size > _MOST_BYTES :]
            kept = [line for line in lines if line.strip()][-_MOST_LINES:]
            if len(lines) > 2 * _MOST_LINES or size > _MOST_BYTES:
                self._replace(kept)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._give_up(error)
            return []
        return kept

    def add(self, line: str) -> None:
        """Write a line that was typed, at once: a chat may be killed."""
        if not self.is_kept:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "a", encoding="utf-8", errors="replace") as file:
                os.chmod(self.path, 0o600)
                file.write(f"{line}\n")
        except OSError as error:
            self._give_up(error)

    def _replace(self, lines: Sequence[str]) -> None:
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
            os.replace(name, self.path)
        except OSError:
            with suppress(OSError):
                os.unlink(name)
            raise

    def _give_up(self, error: OSError) -> None:
        self.is_kept = False
        console.note(f"Note: no history is kept, since {str(self.path)!r} cannot be used: {error.strerror}.")
