"""Messages, as chat templates and servers of OpenAI's kind take them.

    {"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}],
     "images": ["a.jpg"]}
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]}

A part may hold its picture (a path, a `data:` URI or base64), or take one of "images": the one that its "index" names,
or else the next. In a content that is one text, `<image>` and `<video>` are placeholders if the user says them; in a
text part nothing is. Without a placeholder, all pictures stand before the first message of the user. A "prompt" and a
"completion" that are lists of messages are read as one list.

Sources: https://huggingface.co/docs/transformers/chat_templating_multimodal,
https://huggingface.co/docs/trl/dataset_formats and https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_cli.data.formats.format import TurnFormat
from vlm_cli.data.formats.pictures import HOLDERS, read_media_beside, read_medium
from vlm_cli.data.formats.turns import Turn, place_media, read_role, read_system, split_placeholders
from vlm_cli.data.jsonl import RecordError, describe_type, get_field
from vlm_cli.prompt import KINDS, Kind, Medium, Slot, Text

__all__ = ["Messages"]

_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA_PARTS: dict[str, Kind] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}
_HINT = 'To show the words <image>, write the content as parts: [{"type": "text", "text": "…"}].'


class Messages(TurnFormat):
    """Messages of a user and an assistant, with pictures in them or beside them."""

    name = "chat messages"
    key = "messages"
    keys = '"messages", with "images" or with pictures in them'

    def matches(self, data: dict[str, Any]) -> bool:
        return data.get("messages") is not None or _is_split(data)

    def asks(self, data: dict[str, Any]) -> bool:
        return self.matches(data) or isinstance(data.get("prompt"), list)

    def read_turns(self, data: dict[str, Any]) -> tuple[str | None, list[Turn], tuple[str, ...]]:
        is_whole = data.get("messages") is not None
        given = get_field(data, "messages", list, "a list") if is_whole else _join_split(data)
        files = _Files({kind: read_media_beside(data, kind) for kind in KINDS})
        system, turns = read_system(data, [_read_message(x, i, files) for i, x in enumerate(given, start=1)])
        return system, place_media(turns, files.rest(), _HINT), ()


def _is_split(data: dict[str, Any]) -> bool:
    """Tell whether the messages are split into a "prompt" and its "completion"."""
    return all(isinstance(data.get(key), list) for key in ("prompt", "completion"))


def _join_split(data: dict[str, Any]) -> list[Any]:
    """Return the messages of a "prompt" and its "completion", which a question lacks."""
    return [*data["prompt"], *get_field(data, "completion", list, "a list of messages", [])]


@dataclass
class _Files:
    """The files beside the messages, of which parts may name some by their number."""

    media: Mapping[Kind, list[Medium]]
    named: set[tuple[Kind, int]] = field(default_factory=set)

    def take(self, kind: Kind, index: Any, number: int) -> Medium:
        """Return the file that a part of a message names.

        Raises:
            RecordError: if there is none of that number.
        """
        given = self.media[kind]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(given):
            raise RecordError(f'message {number} shows the {kind} of "index" {index!r}, but {len(given)} are given.')
        self.named.add((kind, index))
        return given[index]

    def rest(self) -> dict[Kind, list[Medium]]:
        """Return the files that no part named."""
        return {
            kind: [x for i, x in enumerate(of_kind) if (kind, i) not in self.named]
            for kind, of_kind in self.media.items()
        }


def _read_message(message: Any, number: int, files: _Files) -> Turn:
    if not isinstance(message, dict):
        raise RecordError(f"message {number} must be an object, got {describe_type(message)}.")
    role = read_role(message.get("role"), number)
    if message.get("tool_calls"):
        raise RecordError(f"message {number} calls tools, which vlm cannot learn. Leave the row out.")
    if message.get("weight") == 0:
        raise RecordError(f'message {number} has the "weight" 0, but vlm learns every answer. Leave the row out.')
    content = message.get("content")
    if isinstance(content, str):
        parts = split_placeholders(content, KINDS) if role == "user" else (Text(content),) if content else ()
        return Turn(role, parts, number)
    if not isinstance(content, list):
        raise RecordError(f'message {number}: "content" must be text or a list of parts, got {describe_type(content)}.')
    read = [_read_part(part, number, files) for part in content]
    if role != "user" and any(not isinstance(part, Text) for part in read):
        raise RecordError(f"message {number}, of the {role}, has a picture. Pictures belong in messages of the user.")
    return Turn(role, tuple(part for part in read if not isinstance(part, Text) or part.text), number)


def _read_part(part: Any, number: int, files: _Files) -> Text | Medium | Slot:
    """Return a part of a message: its text, its picture, or a slot for the next one beside the messages."""
    if not isinstance(part, dict):
        raise RecordError(f"message {number}: a part must be an object, got {describe_type(part)}.")
    name = part.get("type")
    if name in _TEXT_PARTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise RecordError(f'message {number}: the "text" of a part must be text, got {describe_type(text)}.')
        return Text(text)
    if not isinstance(name, str) or name not in _MEDIA_PARTS:
        known = ", ".join(("text", *_MEDIA_PARTS))
        raise RecordError(f"message {number} has a part of the unknown type {name!r}. Known: {known}.")
    kind = _MEDIA_PARTS[name]
    held = {key: x for key, x in part.items() if key in (name, "image_url", *HOLDERS) and x is not None}
    if held and (found := read_medium(held.get(name, held.get("image_url", held)), name, kind)) is not None:
        return found
    return Slot(kind=kind) if part.get("index") is None else files.take(kind, part["index"], number)
