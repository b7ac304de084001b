"""LLaVA's conversations: turns of a human and of GPT, with `<image>` where a picture belongs.

    {"id": "7", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

"image" is a file or a list of them, and may be missing; "video" is a clip. Sources, in our words:
https://github.com/haotian-liu/LLaVA and https://github.com/LLaVA-VL/LLaVA-NeXT, `preprocess_multimodal` and the
functions behind it in `llava/train/train.py`:

- the only `<image>` of a turn moves to the turn's front, on a line of its own; several stay where they are;
- an answer that stands before the first question is left out;
- a clip has the placeholder `<image>`, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_cli.data.formats.format import TurnFormat
from vlm_cli.data.formats.pictures import read_media_beside
from vlm_cli.data.formats.turns import Turn, place_media, read_role, read_system, split_placeholders
from vlm_cli.data.jsonl import RecordError, describe_type, get_field
from vlm_cli.prompt import KINDS, Kind, Medium, Slot, Text

__all__ = ["Conversations"]

_TAG = "<image>"


class Conversations(TurnFormat):
    """Turns of a human and of GPT, as LLaVA trains on them."""

    name = "LLaVA conversations"
    key = "conversations"
    keys = '"conversations", with "image"'

    def matches(self, data: dict[str, Any]) -> bool:
        return data.get("conversations") is not None

    def read_turns(self, data: dict[str, Any]) -> tuple[str | None, list[Turn], tuple[str, ...]]:
        media = {kind: read_media_beside(data, kind) for kind in KINDS}
        given = get_field(data, "conversations", list, "a list of turns")
        turns = [_read_turn(turn, number, media) for number, turn in enumerate(given, start=1)]
        system, turns = read_system(data, turns)
        notes = []
        if len(turns) > 1 and turns[0].role == "assistant" and turns[1].role == "user":
            notes = ["begins with an answer, which is left out, as LLaVA does"]
            turns = turns[1:]
        return system, place_media(turns, media), tuple(notes)


def _read_turn(turn: Any, number: int, media: dict[Kind, list[Medium]]) -> Turn:
    if not isinstance(turn, dict):
        raise RecordError(f"turn {number} must be an object, got {describe_type(turn)}.")
    says, text_key = ("from", "value") if "from" in turn or "value" in turn else ("role", "content")
    role = read_role(turn.get(says), number)
    text = turn.get(text_key)
    if not isinstance(text, str):
        raise RecordError(f'turn {number}: "{text_key}" must be text, got {describe_type(text)}.')
    if role == "user":
        return Turn(role, _place_tags(text, media), number)
    if role == "assistant" and _TAG in text and any(media.values()):
        raise RecordError(f"turn {number}, an answer, has {_TAG}. Pictures belong in the turns of the user.")
    return Turn(role, (Text(text),) if text else (), number)


def _place_tags(text: str, media: dict[Kind, list[Medium]]) -> tuple[Text | Slot, ...]:
    """Return the parts of a question. Without clips, `<video>` is text; without pictures, `<image>` is a clip."""
    kinds: Sequence[Kind] = ("image", "video") if media["video"] else ("image",)
    parts = split_placeholders(text, kinds)
    if media["video"] and not media["image"]:
        parts = tuple(Slot(part.offset, "video") if isinstance(part, Slot) else part for part in parts)
    slots = [part for part in parts if isinstance(part, Slot)]
    if len(slots) != 1 or slots[0].offset == 0:
        return parts
    rest = "".join(part.text for part in parts if isinstance(part, Text)).strip()
    return (slots[0], Text(f"\n{rest}")) if rest else (slots[0],)
