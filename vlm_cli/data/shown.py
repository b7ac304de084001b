"""A record as pieces to show: texts, pictures and clips, and what of them the model learns to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm_cli.data.record import Record
from vlm_cli.prompt import Medium, Text

__all__ = ["Piece", "split_record"]


@dataclass(frozen=True)
class Piece:
    """A text or a medium.

    Attributes:
        content: what stands there.
        is_learned: whether the model learns to write it.
    """

    content: Text | Medium
    is_learned: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the piece under "text", "image" or "video"."""
        if isinstance(self.content, Medium):
            return {self.content.kind: self.content.source}
        return {"text": self.content.text, "learned": self.is_learned}


def split_record(record: Record) -> list[Piece]:
    """Return the pieces of a record as its file has them; what the system says comes first, and turns begin a line."""
    pieces = [Piece(Text(record.system))] if record.system else []
    for segment in record.segments:
        if pieces and (record.is_turns or record.system):
            pieces.append(Piece(Text("\n")))
        pieces += [Piece(part, segment.is_target) for part in segment.parts]
    return pieces
