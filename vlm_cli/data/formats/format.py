"""`Format`: how the rows of a file say what a model reads and what it learns to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

from vlm_cli.data.formats.marking import read_marking
from vlm_cli.data.formats.turns import Turn, pair_turns
from vlm_cli.data.record import NO_MARKING, Content, Segment

__all__ = ["ANSWERED", "Format", "TurnFormat"]

#: A note of rows from which only the question counts.
ANSWERED = "has an answer already, which the model does not see"


class Format(ABC):
    """A way to write records.

    Attributes:
        name: for the log and the documentation.
        keys: by which a user knows it, for messages.
    """

    name: ClassVar[str]
    keys: ClassVar[str]

    @abstractmethod
    def matches(self, data: dict[str, Any]) -> bool:
        """Tell whether a row is of this format, from its keys and the types of their values."""

    @abstractmethod
    def read(self, data: dict[str, Any]) -> Content:
        """Return what a row says.

        Raises:
            RecordError: if the row cannot be used.
        """

    def asks(self, data: dict[str, Any]) -> bool:
        """Tell whether a row of questions is of this format; it need not have an answer."""
        return self.matches(data)

    def read_question(self, data: dict[str, Any]) -> Content:
        """Return what a row asks: its last segment is the question. An answer that the row has to it is left out.

        Raises:
            RecordError, PromptError: if the row asks nothing, or its placeholders and files do not match.
        """
        found = self.read(data)
        return replace(found, segments=found.segments[:-1], notes=(*found.notes, ANSWERED))


class TurnFormat(Format):
    """Rows of turns. They may end with a question, which a model is to answer.

    Attributes:
        key: under which a row has its turns.
    """

    key: ClassVar[str]

    @abstractmethod
    def read_turns(self, data: dict[str, Any]) -> tuple[str | None, list[Turn], tuple[str, ...]]:
        """Return what the system says, the turns with their files, and notes.

        Raises:
            RecordError: if the row cannot be used.
        """

    def read(self, data: dict[str, Any]) -> Content:
        system, turns, notes = self.read_turns(data)
        return self._content(data, system, pair_turns(turns, self.key), notes)

    def read_question(self, data: dict[str, Any]) -> Content:
        system, turns, notes = self.read_turns(data)
        if len(turns) > 1 and turns[-1].role == "assistant":
            turns, notes = turns[:-1], (*notes, ANSWERED)
        return self._content(data, system, pair_turns(turns, self.key, is_open=True), notes)

    def _content(
        self, data: dict[str, Any], system: str | None, segments: tuple[Segment, ...], notes: tuple[str, ...]
    ) -> Content:
        marking = read_marking(data) if len(segments) == 2 else NO_MARKING
        return Content(segments, system, self.read_id(data), read_kind(data), notes, is_turns=True, marking=marking)

    def read_id(self, data: dict[str, Any]) -> str | None:
        """Return the id of a row; None if it has none."""
        return read_id(data)


def read_id(data: dict[str, Any]) -> str | None:
    """Return the id of a row of another project; None if it has none, or one that is neither text nor a number."""
    value = data.get("id")
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def read_kind(data: dict[str, Any]) -> str | None:
    """Return the kind of a row of another project, by which scores are grouped; None if it has none."""
    value = data.get("kind")
    return value if isinstance(value, str) else None
