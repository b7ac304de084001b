"""`Record`: what a model learns from, or is tested on, whatever the file looks like."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_cli.prompt import Medium, Text

__all__ = ["NO_MARKING", "Content", "Marking", "Record", "Segment"]


@dataclass(frozen=True)
class Segment:
    """Text and images that the model learns to write (`is_target`), or that it reads before a target."""

    parts: tuple[Text | Medium, ...]
    is_target: bool


@dataclass(frozen=True)
class Marking:
    """By what answers to a record are marked, beyond its target.

    Attributes:
        answers: every right answer; one that several people gave stands there as often. Empty for the target alone.
        choices: among which the question lets one choose.
        metric: by which the benchmark of the record is marked; None if it is of no benchmark.
        group: the questions that count as one, such as those about one picture; empty for none.
    """

    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    metric: str | None = None
    group: str = ""


NO_MARKING = Marking()


@dataclass(frozen=True)
class Content:
    """What a row says, as its format reads it.

    Attributes:
        segments: they alternate: context, target, context, target, …
        system: what the model is told before the first turn; None for nothing.
        id: as the row gives it; None if it gives none.
        kind: by which scores are grouped; None for none.
        notes: what the user should know of how the row was read.
        is_turns: whether it is an exchange of messages, whose spelling a chat template knows; a prompt and its
            completion are the very texts that the model reads and writes.
        marking: by what answers are marked.
    """

    segments: tuple[Segment, ...]
    system: str | None = None
    id: str | None = None
    kind: str | None = None
    notes: tuple[str, ...] = ()
    is_turns: bool = False
    marking: Marking = NO_MARKING


@dataclass(frozen=True)
class Record:
    """One row of a source. Its segments alternate: context, target, context, target, …

    Attributes:
        line: number of the row in its shard, from 1: of the line, in a file of lines.
        id: what the row calls itself, or its unit and number.
        kind: by which scores are grouped; None for none.
        segments: contexts and targets.
        system: what the model is told before the first turn; None for nothing.
        source: name of the source.
        shard: name of the file in it.
        unit: what messages call a row of it.
        is_turns: whether it is an exchange of messages, whose spelling a chat template knows.
        format: the name of the row's format.
        notes: what the user should know of how the row was read.
        marking: by what answers are marked.
    """

    line: int
    id: str
    kind: str | None
    segments: tuple[Segment, ...]
    system: str | None = None
    source: str = ""
    shard: str = ""
    unit: str = "line"
    is_turns: bool = False
    format: str = ""
    notes: tuple[str, ...] = ()
    marking: Marking = NO_MARKING

    @property
    def place(self) -> str:
        """Where the record stands, for a message: `line 7 of a.jsonl`."""
        return f"{self.unit} {self.line} of {self.shard}"

    @property
    def sources(self) -> tuple[Medium, ...]:
        """The images and clips, in reading order."""
        return tuple(part for segment in self.segments for part in segment.parts if isinstance(part, Medium))
