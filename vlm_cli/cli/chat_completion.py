"""What Tab offers in a chat: commands behind a slash, and files where a command or a placeholder takes one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from vlm_cli.printable import escape_controls

__all__ = ["complete_line"]

_COMMAND = re.compile(r"/(\w*)\Z")
_FILE_OF_COMMAND = re.compile(r"/(\w+)[ \t]+(.*)\Z")
_FILE_OF_PLACEHOLDER = re.compile(r"<(?:image|video):([^<>]*)\Z")


def complete_line(line: str, commands: Mapping[str, str]) -> tuple[int, list[str]]:
    """Return where the word begins that can be completed, and what may stand from there on.

    Args:
        line: up to the cursor.
        commands: what each takes, by its name: "FILE", another word, or nothing.
    """
    if found := _COMMAND.match(line):
        names = (name for name in commands if name.startswith(found[1]))
        return found.start(1), [f"{name} " if commands[name] else name for name in names]
    if (found := _FILE_OF_COMMAND.match(line)) and commands.get(found[1]) == "FILE":
        return found.start(2), sorted(_find_files(found[2]))
    if found := _FILE_OF_PLACEHOLDER.search(line):
        # `>` and a backslash have a meaning in a placeholder.
        return found.start(1), sorted(path for path in _find_files(found[1]) if not set(path) & set("<>\\"))
    return len(line), []


def _find_files(typed: str) -> Iterator[str]:
    """Yield the paths that begin with what is typed, folders with a slash at their end."""
    folder, slash, start = typed.rpartition("/")
    try:
        with os.scandir(os.path.expanduser(folder + slash) or ".") as entries:
            for entry in entries:
                is_hidden = entry.name.startswith(".") and not start.startswith(".")
                if entry.name.startswith(start) and not is_hidden and escape_controls(entry.name) == entry.name:
                    yield f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
    except (OSError, ValueError):
        return
