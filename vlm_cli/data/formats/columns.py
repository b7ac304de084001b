"""A column map: which columns of a table are the prompt, the answer and the pictures.

    --columns prompt=question,completion=answer,images=image

On the left stands what vlm reads, on the right the column, with dots for what is inside of it:
`completion=answers.0.text`. Texts are data: a bare `<image>` is a placeholder if the row has pictures, and nothing else
means anything. Without a placeholder, the pictures stand before the prompt. No other column is read. A column mapped to
"messages", "conversations" or "texts" is read as that format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_cli.data.formats.conversations import Conversations
from vlm_cli.data.formats.format import Format, read_id, read_kind
from vlm_cli.data.formats.marking import read_marking
from vlm_cli.data.formats.messages import Messages
from vlm_cli.data.formats.pictures import read_media_beside
from vlm_cli.data.formats.texts import Texts
from vlm_cli.data.formats.turns import Turn, pair_turns, place_media, read_system, split_placeholders
from vlm_cli.data.jsonl import RecordError, describe_type
from vlm_cli.data.meant import find_picture_keys
from vlm_cli.data.record import Content, Segment
from vlm_cli.errors import UsageError
from vlm_cli.prompt import KINDS, Kind, Medium, Text
from vlm_cli.registry import suggest

__all__ = ["ColumnMap"]

_CHATS: dict[str, Format] = {"messages": Messages(), "conversations": Conversations(), "texts": Texts()}
_READ = ("prompt", "completion", "answers", "choices", "images", "videos", "system", "id", "kind", *_CHATS)
_EXAMPLE = "Write, for instance, --columns prompt=question,completion=answer,images=image"


@dataclass(frozen=True)
class ColumnMap(Format):
    """Rows of a table, whose columns the user names."""

    columns: Mapping[str, str]

    name = "columns"
    keys = "what --columns says"

    @classmethod
    def parse(cls, text: str, *, needs_answer: bool = True) -> ColumnMap:
        """Read `--columns`. Without `needs_answer`, a prompt alone will do.

        >>> ColumnMap.parse("prompt=question,completion=answer").columns
        {'prompt': 'question', 'completion': 'answer'}

        Raises:
            UsageError: if it cannot be read, or names neither an answer nor turns.
        """
        columns: dict[str, str] = {}
        for pair in text.split(","):
            key, equals, column = (x.strip() for x in pair.partition("="))
            if not equals or not column:
                raise UsageError(f"--columns expects NAME=COLUMN, got {pair!r}. {_EXAMPLE}")
            key = {"image": "images", "video": "videos"}.get(key, key)
            if key not in _READ:
                raise UsageError(
                    f"--columns has the unknown name {key!r}.{suggest(key, _READ)} Known: {', '.join(_READ)}."
                )
            if key in columns:
                raise UsageError(f"--columns names {key!r} twice: {columns[key]!r} and {column!r}. Give it once.")
            columns[key] = column
        told = [key for key in ("completion", *_CHATS) if key in columns]
        if not told and not needs_answer and "prompt" in columns:
            told = ["prompt"]
        if len(told) != 1 or (told[0] in _CHATS and "prompt" in columns):
            what = "the answer: a completion (with a prompt or without)" if needs_answer else "a prompt"
            raise UsageError(
                f"--columns must name {what}, or one of {', '.join(_CHATS)}. Got {', '.join(columns)}. {_EXAMPLE}"
            )
        return cls(columns)

    def __str__(self) -> str:
        return ",".join(f"{name}={column}" for name, column in self.columns.items())

    def matches(self, data: dict[str, Any]) -> bool:
        return True

    def read(self, data: dict[str, Any]) -> Content:
        row = self._find(data)
        chat = self._find_chat(row)
        return self._read_answer(row) if chat is None else chat.read(row)

    def read_question(self, data: dict[str, Any]) -> Content:
        row = self._find(data)
        if (chat := self._find_chat(row)) is not None:
            return chat.read_question(row)
        if "prompt" not in row:
            raise RecordError("asks nothing: --columns names no prompt. Add prompt=COLUMN.")
        files = {kind: read_media_beside(row, kind) for kind in KINDS}
        system, turns = read_system(row, [self._read_prompt(row, files)])
        asked = pair_turns(place_media(turns, files), "row", is_open=True)
        return Content(asked, system, read_id(row), read_kind(row), is_turns=True)

    def _find(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the values of the columns by what vlm calls them."""
        row = {key: _find_column(data, column) for key, column in self.columns.items()}
        roots = {column.partition(".")[0] for column in self.columns.values()} | set(self.columns.values())
        shows = any(row.get(key) for key in ("images", "videos"))
        if not shows and (left := find_picture_keys({key: x for key, x in data.items() if key not in roots})):
            raise RecordError(f'has pictures in "{left[0]}", which --columns does not name. Add images={left[0]}')
        return row

    def _find_chat(self, row: dict[str, Any]) -> Format | None:
        """Return the format of the turns that a column holds; None if none does."""
        key = next((key for key in _CHATS if key in row), None)
        if key is not None and not isinstance(row[key], list):
            raise RecordError(f'"{self.columns[key]}" must be a list, got {describe_type(row[key])}.')
        return None if key is None else _CHATS[key]

    def _read_prompt(self, row: dict[str, Any], files: Mapping[Kind, Sequence[Medium]]) -> Turn:
        prompt = _read_text(row, "prompt", self.columns)
        return Turn("user", split_placeholders(prompt, [kind for kind in KINDS if files[kind]]), 1)

    def _read_answer(self, row: dict[str, Any]) -> Content:
        """Read a prompt and its completion, or a completion alone."""
        files = {kind: read_media_beside(row, kind) for kind in KINDS}
        completion = _read_text(row, "completion", self.columns)
        if not completion.strip():
            raise RecordError(f'"{self.columns["completion"]}" is empty: the model would have nothing to learn.')
        system, turns = read_system(row, [self._read_prompt(row, files), Turn("assistant", (Text(completion),), 2)])
        turns = place_media(turns, files)
        if not turns[0].parts and "prompt" not in self.columns:  # text alone
            segments: tuple[Segment, ...] = (Segment((), False), Segment((Text(completion),), True))
        else:
            segments = pair_turns(turns, "row")
        marking, is_turns = read_marking(row), bool(segments[0].parts)
        return Content(segments, system, read_id(row), read_kind(row), is_turns=is_turns, marking=marking)


def _find_column(data: dict[str, Any], column: str) -> Any:
    """Return the value of a column: of that very name, or along the dots of the name.

    Raises:
        RecordError: if the row has no such column.
    """
    if column in data:
        return data[column]
    value: Any = data
    for step in column.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            names = ", ".join(list(data)[:12]) + (", …" if len(data) > 12 else "")
            raise RecordError(f'has no column "{column}".{suggest(column, data)} It has: {names or "none"}.')
    return value


def _read_text(row: Mapping[str, Any], key: str, columns: Mapping[str, str]) -> str:
    """Return the text of a column; a number is written as text, and a column that is not named is empty."""
    value = row.get(key, "")
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    hint = f" Name one of them: {key}={columns[key]}.0" if isinstance(value, list) and value else ""
    raise RecordError(f'"{columns[key]}" must be text or a number, got {describe_type(value)}.{hint}')
