"""The requests of OpenAI's batch files: messages in the body of a request to a server.

    {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": […], "max_tokens": 9}}

As a record, only the messages count, and an answer must stand behind them. `vlm batch` reads such rows as a server
does. Source: https://platform.openai.com/docs/guides/batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from vlm_cli.data.formats.format import TurnFormat
from vlm_cli.data.formats.messages import Messages
from vlm_cli.data.formats.turns import Turn
from vlm_cli.data.sources.base import Row

__all__ = ["Requests", "begins_with_request", "is_request", "note_ids"]

MOST_BAD = 100  # rows that cannot be read, behind which nobody looks for a request
_SAID = ("messages", "model")  # keys of a body that every reader of records takes into account


def is_request(data: dict[str, Any]) -> bool:
    """Tell whether a row is a request, from its keys."""
    return isinstance(data.get("body"), dict) and ("custom_id" in data or "url" in data)


def begins_with_request(rows: Iterator[Row]) -> tuple[bool, Iterator[Row]]:
    """Tell whether the first row that can be read is a request; return all rows beside it."""
    read = []
    for row in rows:
        read.append(row)
        if row.problem is None or len(read) == MOST_BAD:
            break
    return bool(read) and is_request(read[-1].data), chain(read, rows)


def note_ids(rows: Iterable[Row], first: dict[str, str]) -> Iterator[Row]:
    """Pass rows on, and note for the id of each request the place of the row that has it first."""
    for row in rows:
        if isinstance(name := row.data.get("custom_id"), str):
            first.setdefault(name, row.place)
        yield row


class Requests(TurnFormat):
    """Messages in requests to a server."""

    name = "requests of OpenAI's protocol"
    key = "messages"
    keys = '"body" with "messages"'

    def matches(self, data: dict[str, Any]) -> bool:
        return is_request(data)

    def read_turns(self, data: dict[str, Any]) -> tuple[str | None, list[Turn], tuple[str, ...]]:
        system, turns, notes = Messages().read_turns({"messages": [], **data["body"]})
        left = [key for key, value in data["body"].items() if key not in _SAID and value is not None]
        return system, turns, (*notes, *([f'has "{left[0]}" in its body, which is not read'] if left else []))

    def read_id(self, data: dict[str, Any]) -> str | None:
        return super().read_id({"id": data.get("custom_id")})
