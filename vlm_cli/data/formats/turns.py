"""Turns of a conversation: who says what, which files its placeholders take, and what the model learns of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from vlm_cli.data.jsonl import RecordError, describe_type
from vlm_cli.data.record import Segment
from vlm_cli.prompt import KINDS, Kind, Medium, Slot, Text
from vlm_cli.registry import suggest

__all__ = ["Role", "Turn", "pair_turns", "place_media", "read_role", "read_system", "split_placeholders"]

Role: TypeAlias = Literal["system", "user", "assistant"]

#: What other projects call the three roles.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_PLACEHOLDER = re.compile("<(image|video)>")


@dataclass(frozen=True)
class Turn:
    """What one side says; a `Slot` stands where the next picture or clip of the row belongs."""

    role: Role
    parts: tuple[Text | Medium | Slot, ...]
    number: int  # in the row, from 1, for messages

    @property
    def is_empty(self) -> bool:
        return not any(not isinstance(part, Text) or part.text.strip() for part in self.parts)


def read_role(value: Any, number: int) -> Role:
    """Return the role that a row names.

    Raises:
        RecordError: if no role has that name.
    """
    if isinstance(value, str) and (role := ROLES.get(value.strip().lower())):
        return role
    got = repr(value) if isinstance(value, str) else describe_type(value)
    hint = suggest(value, ROLES) if isinstance(value, str) else ""
    raise RecordError(f"turn {number} has the unknown role {got}.{hint} Known: {', '.join(ROLES)}.")


def read_system(data: Mapping[str, Any], turns: Sequence[Turn]) -> tuple[str | None, list[Turn]]:
    """Return what the model is told before the first turn, and the turns behind it.

    Raises:
        RecordError: if the row has several system texts, or one in another place, or with a picture.
    """
    beside = data.get("system")
    if beside is not None and not isinstance(beside, str):
        raise RecordError(f'"system" must be text, got {describe_type(beside)}.')
    told = [beside] if beside else []
    rest = list(turns)
    if rest and rest[0].role == "system":
        first = rest.pop(0)
        if any(not isinstance(part, Text) for part in first.parts):
            raise RecordError(f"turn {first.number}, of the system, has a picture. Show it in a turn of the user.")
        told += ["".join(part.text for part in first.parts if isinstance(part, Text))]
    if len(told) > 1:
        raise RecordError('has a "system" beside its turns and a turn of the system. Give one of them.')
    if late := [turn.number for turn in rest if turn.role == "system"]:
        raise RecordError(f"turn {late[0]} is of the system, which may speak only once, before all others.")
    return (told[0] or None if told else None), rest


def split_placeholders(text: str, kinds: Sequence[Kind]) -> tuple[Text | Slot, ...]:
    """Split a text at its bare placeholders of some kinds. Nothing else in it means anything, and no file is opened.

    >>> split_placeholders("a <image> and <video>", ["image"])
    (Text(text='a '), Slot(offset=2, kind='image'), Text(text=' and <video>'))
    """
    parts: list[Text | Slot] = []
    position = 0
    for found in _PLACEHOLDER.finditer(text):
        kind: Kind = "video" if found[1] == "video" else "image"
        if kind not in kinds:
            continue
        parts += [Text(text[position : found.start()]), Slot(found.start(), kind)]
        position = found.end()
    parts.append(Text(text[position:]))
    return tuple(part for part in parts if not isinstance(part, Text) or part.text)


def place_media(turns: Sequence[Turn], media: Mapping[Kind, Sequence[Medium]], hint: str = "") -> list[Turn]:
    """Put the files of a row where its placeholders stand; without any, before the first turn of the user.

    Args:
        turns: without the system's.
        media: the files of each kind, in order.
        hint: what to do if the numbers differ, as a sentence.

    Raises:
        RecordError: if there are more or fewer placeholders than files.
    """
    slots = [part for turn in turns for part in turn.parts if isinstance(part, Slot)]
    shown = tuple(medium for kind in KINDS for medium in media[kind])
    if not slots and not any(isinstance(part, Medium) for turn in turns for part in turn.parts):
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if not shown or first is None:
            return list(turns)
        return [*turns[:first], replace(turns[first], parts=(*shown, *turns[first].parts)), *turns[first + 1 :]]
    for kind in KINDS:
        has, given = sum(slot.kind == kind for slot in slots), len(media[kind])
        if has != given:
            files = f"{given} {'picture' if kind == 'image' else 'clip'}{'' if given == 1 else 's'}"
            raise RecordError(
                f"has {has} placeholder{'' if has == 1 else 's'} <{kind}>, but {files}. Give one for each."
                f"{f' {hint}' if hint else ''}"
            )
    left = {kind: iter(media[kind]) for kind in KINDS}
    return [
        replace(turn, parts=tuple(next(left[p.kind]) if isinstance(p, Slot) else p for p in turn.parts))
        for turn in turns
    ]


def pair_turns(
    turns: Sequence[Turn], key: str, *, is_open: bool = False, may_be_empty: bool = False
) -> tuple[Segment, ...]:
    """Pair each answer with the turn of the user before it.

    Args:
        turns: without the system's, all files in their places.
        key: of the turns in the row, for messages.
        is_open: whether the last turn is a question, which a model is to answer.
        may_be_empty: whether an answer may say nothing, since nobody learns it.

    Raises:
        RecordError: if the turns do not alternate, beginning with the user's, or an answer is empty.
    """
    if not turns:
        raise RecordError(f'"{key}" is empty: the model would have nothing to {"answer" if is_open else "learn"}.')
    expected: tuple[Role, Role] = ("user", "assistant")
    for i, turn in enumerate(turns):
        if turn.role != expected[i % 2]:
            before = f"follows turn {turns[i - 1].number} of the same role" if i else "is the first"
            raise RecordError(
                f"turn {turn.number}, of the {turn.role}, {before}. Turns must alternate: user, assistant, user, …"
            )
        if turn.role == "assistant" and turn.is_empty and not may_be_empty:
            raise RecordError(f"turn {turn.number}, an answer, is empty: the model would have nothing to learn.")
        if turn.role == "user" and not turn.parts:
            raise RecordError(f"turn {turn.number}, of the user, is empty.")
    if is_open and turns[-1].role == "assistant":
        raise RecordError(f"turn {turns[-1].number}, the last, is an answer: there is nothing to answer.")
    if not is_open and turns[-1].role == "user":
        raise RecordError(f"turn {turns[-1].number}, the last, has no answer from which the model could learn.")
    return tuple(
        Segment(tuple(part for part in turn.parts if not isinstance(part, Slot)), turn.role == "assistant")
        for turn in turns
    )
