"""A conversation as a file of messages: one line of JSON, as `vlm train --data` and clients of OpenAI read it.

{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/home/me/cat.png"}},
                                           {"type": "text", "text": "What is it?"}]},
              {"role": "assistant", "content": " A cat."}]}
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_cli.data.formats.messages import Messages
from vlm_cli.data.formats.turns import pair_turns
from vlm_cli.data.inputs import is_stdin
from vlm_cli.data.jsonl import RecordError, describe_type
from vlm_cli.errors import DataError, OutputExistsError, UsageError
from vlm_cli.files import replacing_file
from vlm_cli.lookalike import find_named
from vlm_cli.plain_data import read_json
from vlm_cli.prompt import Medium, Text
from vlm_cli.writing.turns import Exchange

__all__ = ["SavedChat", "read_chat", "save_chat"]


@dataclass(frozen=True)
class SavedChat:
    """What a conversation says.

    Attributes:
        turns: in their order; at least one.
        system: what the model is told before the first turn; None for nothing.
    """

    turns: tuple[Exchange, ...]
    system: str | None = None

    @property
    def media(self) -> list[Medium]:
        """The images and clips, in reading order."""
        return [part for turn in self.turns for part in turn.asks if isinstance(part, Medium)]


def save_chat(path: Path, chat: SavedChat, *, overwrite: bool) -> None:
    """Write a conversation, whole or not at all.

    Raises:
        UsageError: if the path is `-`.
        OutputExistsError: if the file exists, and may not be replaced.
        CheckpointError: if it cannot be written.
    """
    _refuse_stdin(path)
    if os.path.exists(path) and not overwrite:
        raise OutputExistsError(f"{str(path)!r} exists, and stays as it is. Choose another name.")
    messages: list[dict[str, Any]] = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    for turn in chat.turns:
        messages.append({"role": "user", "content": list(map(_write_part, turn.asks))})
        messages.append({"role": "assistant", "content": turn.answer})
    with replacing_file(path, overwrite=overwrite) as file:
        file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _write_part(part: Text | Medium) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    name = f"{part.kind}_url"
    return {"type": name, name: {"url": part.source}}


def read_chat(path: Path) -> SavedChat:
    """Read a conversation; its pictures are not opened.

    Raises:
        UsageError: if the path is `-`.
        DataError: if the file cannot be read, or holds no conversation whose last turn is answered.
    """
    _refuse_stdin(path)
    path = find_named(path)
    try:
        data = read_json(path)
        data = {"messages": data} if isinstance(data, list) else data
        if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
            raise ValueError(_not_a_chat(data))
        system, turns, _ = Messages().read_turns(data)
        if not turns:
            raise RecordError("it holds no turn.")
        if turns[-1].role == "user":
            raise RecordError(f"message {turns[-1].number}, the last, has no answer. Leave it out, and ask it anew.")
        segments = pair_turns(turns, "messages", may_be_empty=True)
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f'{str(path)!r} is no conversation: {error}. /save writes {{"messages": […]}}.') from None
    except RecordError as error:
        raise DataError(f"{str(path)!r} is no conversation to go on with: {error}") from None
    answers = ("".join(part.text for part in x.parts if isinstance(part, Text)) for x in segments[1::2])
    return SavedChat(tuple(Exchange(x.parts, text) for x, text in zip(segments[::2], answers, strict=True)), system)


def _not_a_chat(data: Any) -> str:
    if isinstance(data, dict):
        given = data.get("messages")
        return 'it has no "messages"' if given is None else f'"messages" must be a list, got {describe_type(given)}'
    return f"it holds {describe_type(data)}, not an object"


def _refuse_stdin(path: Path) -> None:
    if is_stdin(path):
        raise UsageError("- means a standard stream, which the chat itself needs. Give a file.")
