"""Read JSONL: the object on a line, and fields of a known type."""

from __future__ import annotations

import json
from typing import Any

from vlm_cli.errors import VLMError
from vlm_cli.registry import suggest
from vlm_cli.text import decode_text

__all__ = ["RecordError", "describe_type", "get_field", "parse_object"]

_MISSING = object()


class RecordError(VLMError):
    """A line that cannot be used. The message says why, and quotes only that line."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a line as a JSON object.

    Raises:
        RecordError: if the line is not UTF-8, not JSON, or no object.
    """
    try:
        text = decode_text(raw)
    except ValueError as error:
        raise RecordError(f"{error}.") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error.msg} at character {error.colno}.") from None
    except ValueError as error:  # a number with more digits than Python reads
        raise RecordError(f"not JSON: {error}.") from None
    except RecursionError:
        raise RecordError("not a record: it is nested too deeply.") from None
    if not isinstance(data, dict):
        raise RecordError(f"not a record: expected an object, {{…}}, got {describe_type(data)}.")
    return data


def get_field(
    data: dict[str, Any], key: str, types: type | tuple[type, ...], words: str, default: Any = _MISSING
) -> Any:
    """Return the value of a key, after a check of its type.

    Args:
        data: the object of one line.
        key: the name of the field.
        types: Python types that the value may have; true and false are never accepted as numbers.
        words: those types in words, for the message.
        default: the value of a field that is missing; without a default, a missing field is an error.

    Raises:
        RecordError: if the value has another type, or is missing and has no default.
    """
    value = data.get(key, default)
    if value is _MISSING:
        known = [x for x in data if x not in ("id", "kind", "images")]
        raise RecordError(f'has no "{key}".{suggest(key, known)}')
    if value is default:
        return value
    if not isinstance(value, types) or isinstance(value, bool):
        raise RecordError(f'"{key}" must be {words}, got {describe_type(value)}.')
    return value


def describe_type(value: Any) -> str:
    """Name the JSON type of a value in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), "a file")  # which a shard holds
