"""What a row says of right answers beside its completion: several answers, and choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_cli.data.jsonl import RecordError, describe_type
from vlm_cli.data.record import NO_MARKING, Marking

__all__ = ["read_marking", "read_own_marking"]

_KEYS = ("answers", "choices")


def read_own_marking(data: Mapping[str, Any], *, num_turns: int) -> Marking:
    """Return the "answers" and "choices" of one of vlm's own records.

    Raises:
        RecordError: if one is no list of texts, or the record has several completions.
    """
    for key in _KEYS:
        if key in data and not _texts(data[key]):
            raise RecordError(f'"{key}" must be a list of texts, got {describe_type(data[key])}.')
        if data.get(key) and num_turns > 1:
            raise RecordError(
                f'has "{key}" beside {num_turns} turns, and they say not to which. Write a record for each.'
            )
    return read_marking(data)


def read_marking(data: Mapping[str, Any]) -> Marking:
    """Return the "answers" and "choices" of a row of another project, where these keys may mean something else."""
    answers, choices = (_texts(data.get(key)) for key in _KEYS)
    return Marking(answers, choices) if answers or choices else NO_MARKING


def _texts(value: Any) -> tuple[str, ...]:
    """Return the texts of a list; none if it is no list of texts."""
    return tuple(value) if isinstance(value, list) and all(isinstance(x, str) for x in value) else ()
