"""Pictures and clips that a row brings beside its texts: file names, `data:` URIs, base64, or bytes in the shard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlm_cli.data.jsonl import RecordError, describe_type
from vlm_cli.data.sources.base import Embedded
from vlm_cli.prompt import Kind, Medium

__all__ = ["HOLDERS", "read_media", "read_media_beside", "read_medium"]

#: Where an object keeps the picture itself, by preference: bytes in the shard, then base64, then an address.
HOLDERS = ("bytes", "base64", "data", "image", "video", "url", "path", "file_name")
#: The beginnings of PNG, JPEG, GIF, WebP and MP4 in base64; a file name of that length with no dot in it is unlikely.
_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|AAAA[A-Za-z0-9+/]{2}Z0eX)[A-Za-z0-9+/\s]{40,}={0,2}\s*")
_TYPES = {"iVBO": "image/png", "/9j/": "image/jpeg", "R0lG": "image/gif", "UklG": "image/webp", "AAAA": "video/mp4"}


def read_media(value: Any, key: str, kind: Kind) -> list[Medium]:
    """Return the pictures or clips of a column: one, a list of them, or none for null.

    Raises:
        RecordError: if the value is of another type.
    """
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [medium for x in values if (medium := read_medium(x, key, kind)) is not None]


def read_medium(value: Any, key: str, kind: Kind) -> Medium | None:
    """Return one picture or clip; None for an object in which nothing is set.

    Raises:
        RecordError: if the value is of another type.
    """
    what = "picture" if kind == "image" else "clip"
    if isinstance(value, Embedded):
        return Medium(value.reference, kind)
    if isinstance(value, str) and value.strip():
        return Medium(_with_header(value), kind)
    if isinstance(value, dict):
        found = next((value[holder] for holder in HOLDERS if value.get(holder)), None)
        if found is None and all(x is None for x in value.values()):
            return None
        if isinstance(found, (str, Embedded)):
            return read_medium(found, key, kind)
    got = "an empty text" if isinstance(value, str) else describe_type(value)
    raise RecordError(
        f'"{key}" must hold a {what}: the name of a file, a data: URI, or base64, got {got}'
        f"{'' if not isinstance(value, dict) else f' with the keys {_names(value)}'}."
    )


def _names(value: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in list(value)[:5]) or "none"


def _with_header(text: str) -> str:
    """Write base64 alone as a `data:` URI; anything else is a file name or a URI already."""
    if len(text) < 60 or not _BASE64.fullmatch(text):
        return text
    return f"data:{_TYPES[text[:4]]};base64,{text}"


def read_media_beside(data: Mapping[str, Any], kind: Kind) -> list[Medium]:
    """Return the pictures or clips that a row has beside its texts, under "image" or "images".

    Raises:
        RecordError: if the row has both, or a value of another type.
    """
    found = {key: read_media(data.get(key), key, kind) for key in (kind, f"{kind}s")}
    if all(found.values()):
        raise RecordError(f'has both "{kind}" and "{kind}s". Give one of them.')
    return [medium for media in found.values() for medium in media]
