"""Messages as other programs write them, Transformers' `apply_chat_template` among them.

    [{"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "What is it?"}]}]

A part is a text, or a picture or clip: with its source, or without, where the caller gives the pictures apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_cli.errors import PromptError
from vlm_cli.prompt import KINDS, Kind, Medium, Text
from vlm_cli.schema import show
from vlm_cli.templates.conversation import Message

__all__ = ["ReadMessages", "read_messages"]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
#: Types of parts -> what they show, and the keys that may hold it.
_TYPES: dict[str, tuple[Kind, tuple[str, ...]]] = {
    **{kind: (kind, (kind, "url", "path", "base64")) for kind in KINDS},
    **{f"{kind}_url": (kind, (f"{kind}_url",)) for kind in KINDS},
}


@dataclass
class ReadMessages:
    """A conversation, and what its pictures and clips are.

    Attributes:
        messages: in their order; each picture is a `Medium` without a name.
        media: for each picture and clip, in reading order, its kind and where it is: a path, a URL, an object that
            holds it, or None if the message does not say.
    """

    messages: list[Message] = field(default_factory=list)
    media: list[tuple[Kind, Any]] = field(default_factory=list)


def read_messages(conversation: Sequence[Mapping[str, Any]]) -> ReadMessages:
    """Read a conversation.

    Raises:
        PromptError: naming what is wrong with a message.
    """
    if isinstance(conversation, (str, Mapping)) or not isinstance(conversation, Sequence):
        raise PromptError(f"a conversation is a list of messages, got {show(conversation)}.")
    found = ReadMessages()
    for i, message in enumerate(conversation):
        if not isinstance(message, Mapping):
            raise PromptError(f"message {i + 1} must be a mapping with role and content, got {show(message)}.")
        role = _ROLES.get(str(message.get("role")))
        if role is None:
            raise PromptError(f"message {i + 1} has the role {show(message.get('role'))}. Known: {', '.join(_ROLES)}.")
        parts = tuple(_read_parts(message.get("content"), f"message {i + 1}", found))
        if role != "user" and any(isinstance(part, Medium) for part in parts):
            raise PromptError(
                f"message {i + 1} is the {role}'s and has a picture. Pictures stand in those of the user."
            )
        found.messages.append(Message(role, parts))  # type: ignore[arg-type]
    if not found.messages:
        raise PromptError("the conversation has no messages.")
    return found


def _read_parts(content: Any, place: str, found: ReadMessages) -> Iterator[Text | Medium]:
    if isinstance(content, str):
        yield Text(content)
        return
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise PromptError(f"the content of {place} must be a text or a list of parts, got {show(content)}.")
    for part in content:
        if isinstance(part, str):
            yield Text(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise PromptError(f"a text of {place} is {show(part.get('text'))}.")
            yield Text(part["text"])
        elif kind in _TYPES:
            shown, keys = _TYPES[kind]
            found.media.append((shown, _find_source(part, keys, place)))
            yield Medium("", shown)
        else:
            raise PromptError(f"{place} has a part {show(part)}. Known types: text, {', '.join(_TYPES)}.")


def _find_source(part: Mapping[str, Any], keys: Sequence[str], place: str) -> Any:
    """Return what a part shows; None if it does not say.

    Raises:
        PromptError: if it says two things, or an empty one.
    """
    given = [key for key in keys if part.get(key) is not None]
    if len(given) > 1:
        raise PromptError(f"a picture of {place} has {' and '.join(given)}. Give one of them.")
    if not given:
        return None
    source = part[given[0]]
    if isinstance(source, Mapping):  # OpenAI's {"image_url": {"url": …}}
        source = source.get("url")
    if source is None or source == "":
        raise PromptError(f"a picture of {place} is empty: {given[0]} is {show(part[given[0]])}.")
    return f"data:;base64,{source}" if given[0] == "base64" else source
