"""What a user may type in a chat besides turns: `/image FILE`, `/clear`, `/save FILE` and others."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_cli.cli import console
from vlm_cli.cli.chat_session import ChatSession
from vlm_cli.cli.line_editor import BLOCK
from vlm_cli.errors import UsageError
from vlm_cli.printable import count_of
from vlm_cli.registry import suggest

__all__ = ["COMMANDS", "ChatCommand", "ChatEnd", "is_command", "run_command", "unescape"]


class ChatEnd(Exception):
    """The user has asked to end the chat."""


@dataclass(frozen=True)
class ChatCommand:
    """A command of the chat.

    Attributes:
        run: does it, with what stands behind its name.
        summary: for /help.
        takes: what stands behind its name; empty for nothing.
    """

    run: Callable[[ChatSession, str], None]
    summary: str
    takes: str = ""


def is_command(text: str) -> bool:
    """Tell whether a typed text is a command, and not a turn."""
    return text.startswith("/") and not text.startswith("//")


def unescape(text: str) -> str:
    """Return the turn that a typed text means: two slashes at its start stand for one."""
    return text.removeprefix("/") if text.startswith("//") else text


def run_command(session: ChatSession, text: str) -> None:
    """Do what a command says.

    Raises:
        UsageError: if there is no such command, or it takes something else.
        VLMError: if it cannot be done; the conversation then stays as it was.
        ChatEnd: if the chat ends.
    """
    name, *rest = text.removeprefix("/").split(maxsplit=1) or [""]
    given = rest[0].strip() if rest else ""
    command = COMMANDS.get(name)
    if command is None:
        known = ", ".join(f"/{x}" for x in COMMANDS)
        hint = suggest(f"/{name}", [f"/{x}" for x in COMMANDS]) if "/" not in name else ""
        raise UsageError(
            f"unknown command {f'/{name}'!r}.{hint}\nKnown: {known}.\n"
            "A turn that begins with a slash is typed with two: //"
        )
    if command.takes and not given:
        raise UsageError(f"/{name} needs something behind it: /{name} {command.takes}")
    if given and not command.takes:
        raise UsageError(f"/{name} takes nothing behind it, got {given!r}. Type /{name} alone.")
    command.run(session, _read_path(given) if command.takes == "FILE" else given)


def _read_path(typed: str) -> str:
    """Return the path that is meant; terminals write the name of a file that is dropped on them as a shell takes it."""
    typed = os.path.expanduser(typed)
    is_quoted = typed[0] in "'\"" or (os.name != "nt" and "\\ " in typed)
    if is_quoted and not os.path.exists(typed):
        try:
            words = shlex.split(typed)
        except ValueError:  # a quotation mark without its other
            return typed
        return words[0] if len(words) == 1 else typed
    return typed


def _show_image(session: ChatSession, given: str) -> None:
    session.show(given, "image")


def _show_video(session: ChatSession, given: str) -> None:
    session.show(given, "video")


def _clear(session: ChatSession, given: str) -> None:
    session.begin(session.system)
    console.note("Turns and pictures are forgotten." + (" The system text stays." if session.system else ""))


def _tell_system(session: ChatSession, given: str) -> None:
    forgotten = f"; {count_of(len(session.exchanges), 'turn')} forgotten" if session.exchanges else ""
    session.begin(given)
    console.note(f"The conversation begins with this system text{forgotten}.")


def _save(session: ChatSession, given: str) -> None:
    session.save(Path(given))
    console.note(f"Saved: {given} ({count_of(len(session.exchanges), 'turn')})")
    if empty := [i for i, turn in enumerate(session.exchanges, start=1) if not turn.answer.strip()]:
        console.note(f"Note: the answer to turn {empty[0]} is empty, which `vlm train` refuses.")


def _load(session: ChatSession, given: str) -> None:
    session.load(Path(given))
    console.note(f"Loaded: {given} ({count_of(len(session.exchanges), 'turn')})")


def _help(session: ChatSession, given: str) -> None:
    shown = {f"/{name} {command.takes}".rstrip(): command.summary for name, command in COMMANDS.items()}
    for word, summary in {**shown, **_OTHERS}.items():
        console.notify(f"  {word:<14}{summary}")


def _exit(session: ChatSession, given: str) -> None:
    raise ChatEnd


#: What /help tells besides commands.
_OTHERS = {
    "<image:FILE>": "in a turn shows an image there, <video:FILE> a clip",
    "\\": "at the end of a line: the turn goes on in the next one",
    BLOCK: f"opens a turn of several lines, and {BLOCK} closes it",
    "//": "begins a turn with a slash",
    "Tab": "completes commands and files",
    "Ctrl-C": "ends an answer, or clears what is typed",
    "Ctrl-D": "ends the chat",
}

COMMANDS = {
    "image": ChatCommand(_show_image, "show an image before your next turn, or at its <image>", "FILE"),
    "video": ChatCommand(_show_video, "show a clip, in the same way", "FILE"),
    "clear": ChatCommand(_clear, "forget turns and pictures, but not the system text"),
    "system": ChatCommand(_tell_system, "begin anew, with TEXT as the system text", "TEXT"),
    "save": ChatCommand(_save, "write the conversation as messages, in JSON", "FILE"),
    "load": ChatCommand(_load, "go on with a saved conversation, in place of this one", "FILE"),
    "help": ChatCommand(_help, "say what you can type"),
    "exit": ChatCommand(_exit, "end the chat"),
}
