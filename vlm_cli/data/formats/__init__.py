"""The formats of records: `ours`, and those in which other projects publish data.

`recognise` tells the format of a row from its keys, so one file may hold rows of several formats.
"""

from __future__ import annotations

from typing import Any

from vlm_cli.data.formats.format import Format
from vlm_cli.data.formats.ours import OwnRecords
from vlm_cli.data.record import Content

__all__ = ["FORMATS", "Format", "read_content", "recognise"]

FORMATS: tuple[Format, ...] = (OwnRecords(),)


def recognise(data: dict[str, Any]) -> Format:
    """Return the format of a row; vlm's own, whose errors say what is possible, if none matches."""
    return next((x for x in FORMATS if x.matches(data)), FORMATS[0])


def read_content(data: dict[str, Any]) -> Content:
    """Return what a row says, in whichever format it is.

    Raises:
        RecordError: if the row cannot be used.
    """
    return recognise(data).read(data)
