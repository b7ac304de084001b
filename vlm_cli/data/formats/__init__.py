"""The formats of records: `ours`, those of other projects, those of benchmarks, and columns that the user names.

A row is recognised by its keys, so one file may hold rows of several formats.
"""

from __future__ import annotations

from typing import Any

from vlm_cli.data.formats.benchmarks import BENCHMARKS
from vlm_cli.data.formats.columns import ColumnMap
from vlm_cli.data.formats.conversations import Conversations
from vlm_cli.data.formats.format import Format
from vlm_cli.data.formats.messages import Messages
from vlm_cli.data.formats.ours import OwnRecords
from vlm_cli.data.formats.requests import Requests
from vlm_cli.data.formats.texts import Texts
from vlm_cli.data.jsonl import RecordError

__all__ = ["BENCHMARKS", "FORMATS", "ColumnMap", "Format", "recognise", "recognise_question"]

FORMATS: tuple[Format, ...] = (OwnRecords(), Conversations(), Messages(), Texts(), Requests())
#: A row that has something to learn under one of these keys is of no benchmark.
_LEARNED = frozenset(("prompt", "completion", "turns", "messages", "conversations", "texts"))


def recognise(data: dict[str, Any]) -> Format:
    """Return the format of a row; vlm's own, whose errors say what is possible, if none matches.

    Raises:
        RecordError: if two match.
    """
    found = [x for x in _benchmarks(data) if x.matches(data)] or [x for x in FORMATS if x.matches(data)]
    if len(found) > 1:
        both = " and as ".join(f"{x.name} ({x.keys})" for x in found)
        key = next((key for key in ("messages", "conversations", "texts") if key in data), "completion")
        raise RecordError(f"can be read as {both}. Say which columns count, for instance --columns {key}={key}")
    return found[0] if found else FORMATS[0]


def recognise_question(data: dict[str, Any]) -> Format:
    """Return the format of a row of questions; vlm's own if it has a prompt, or if none matches."""
    return next((x for x in (*_benchmarks(data), *FORMATS) if x.asks(data)), FORMATS[0])


def _benchmarks(data: dict[str, Any]) -> tuple[Format, ...]:
    """Return the benchmarks of which a row may be: none if it says under a key of ours what is asked or learned."""
    return BENCHMARKS if _LEARNED.isdisjoint(data) else ()
