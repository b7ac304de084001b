"""`Record`: what a model learns from, or is tested on, whatever the file looks like."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_cli.prompt import Medium, Text

__all__ = ["Content", "Record", "Segment"]


@dataclass(frozen=True)
class Segment:
    """Text and images that the model learns to write (`is_target`), or that it reads before a target."""

    parts: tuple[Text | Medium, ...]
    is_target: bool


@dataclass(frozen=True)
class Content:
    """What a row says, as its format reads it.

    Attributes:
        segments: they alternate: context, target, context, target, …
        system: what the model is told before the first turn; None for nothing.
        id: as the row gives it; None if it gives none.
        kind: by which scores are grouped; None for none.
        notes: what the user should know of how the row was read.
    """

    segments: tuple[Segment, ...]
    system: str | None = None
    id: str | None = None
    kind: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One line of a file. Its segments alternate: context, target, context, target, …"""

    line: int  # number of the line, from 1
    id: str
    kind: str | None
    segments: tuple[Segment, ...]
    system: str | None = None  # what the model is told before the first turn

    @property
    def sources(self) -> tuple[Medium, ...]:
        """The images and clips, in reading order."""
        return tuple(part for segment in self.segments for part in segment.parts if isinstance(part, Medium))
