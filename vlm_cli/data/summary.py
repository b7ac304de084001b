"""What a source of records holds: counts, sizes of pictures, lengths, rows that cannot be used, and a few others.

The rows are read one after the other, and none is kept but those to show. Of pictures and clips the headers are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, TypeAlias

from vlm_cli.data.histogram import Distribution
from vlm_cli.data.meant import find_mentions, mention_notes
from vlm_cli.data.media_check import MediaCheck
from vlm_cli.data.problems import MOST_SHOWN, Problem
from vlm_cli.data.record import Record
from vlm_cli.data.records import Reading, format_note, read_record
from vlm_cli.data.shown import Piece, split_record
from vlm_cli.data.sources import Row, Source
from vlm_cli.errors import VLMError
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import Text

__all__ = ["Example", "Measured", "Summary", "summarize"]

_MOST_MENTIONS = 100_000  # that are remembered of one source


class Measured(NamedTuple):
    """How long a record is for a model.

    Attributes:
        tokens: of the longest sequence.
        learned: tokens that the model learns, of all sequences.
        positions: of the language model that the longest sequence takes.
        show: returns the record as the model sees it.
    """

    tokens: int
    learned: int
    positions: int
    show: Callable[[], list[Piece]]


Measure: TypeAlias = Callable[[Record, MediaLoader], Measured]


@dataclass(frozen=True)
class Example:
    """A record to show."""

    record: Record
    pieces: list[Piece]
    measured: Measured | None

    def to_dict(self) -> dict[str, Any]:
        """Return the place of the record and its pieces."""
        lengths = {} if self.measured is None else {name: getattr(self.measured, name) for name in Measured._fields[:3]}
        told = {"place": self.record.place, "id": self.record.id, **lengths}
        return {**told, "pieces": [piece.to_dict() for piece in self.pieces]}


@dataclass
class Summary:
    """What a source holds.

    Attributes:
        source: the source.
        rows: number of rows that can be used.
        num_problems: number of rows that cannot be used.
        problems: the first of them.
        formats: how many rows are in which format.
        images: pictures of a row -> rows that have so many.
        clips: the same, of clips.
        turns: answers of a row -> rows that have so many.
        systems: number of rows in which the system says something.
        sizes: width and height of a picture -> how often a picture of that size is shown.
        ids: how often each id is used.
        lengths: for what is counted, such as "tokens" and "learned tokens", the number of each row.
        notes: what the user should know of rows that can be used.
        examples: rows to show.
    """

    source: Source
    rows: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    clips: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    systems: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    ids: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    @property
    def repeated(self) -> dict[str, int]:
        """The ids that several rows have, the most frequent first."""
        return {name: count for name, count in self.ids.most_common() if count > 1}

    def to_dict(self) -> dict[str, Any]:
        """Return everything, without the ids that only one row has."""

        def by_number(counts: Counter[int]) -> dict[str, int]:
            return {str(number): counts[number] for number in sorted(counts)}

        return {
            "source": self.source.name,
            "kind": self.source.kind,
            "detail": self.source.detail,
            "shards": len(self.source.shards),
            "formats": dict(self.formats.most_common()),
            "rows": self.rows,
            "bad_rows": self.num_problems,
            "problems": [{"row": x.line, "shard": x.shard, "unit": x.unit, "reason": x.message} for x in self.problems],
            "images": by_number(self.images),
            "clips": by_number(self.clips),
            "sizes": [{"width": w, "height": h, "images": n} for (w, h), n in self.sizes.most_common(MOST_SHOWN)],
            "turns": by_number(self.turns),
            "systems": self.systems,
            "repeated_ids": dict(list(self.repeated.items())[:MOST_SHOWN]),
            "num_repeated_ids": len(self.repeated),
            "lengths": {name: Distribution(values).to_dict() for name, values in self.lengths.items() if values},
            "notes": self.notes,
            "examples": [x.to_dict() for x in self.examples],
        }


def summarize(
    source: Source,
    reading: Reading,
    *,
    measure: Measure | None = None,
    show: int = 0,
    seed: int = 0,
    report: Callable[[], None] = lambda: None,
) -> Summary:
    """Read a source to its end.

    Args:
        source: the source.
        reading: what the user says of its rows and pictures.
        measure: how long a record is for a model; it raises a `VLMError` if the model cannot read it. None counts
            characters.
        show: how many records to show, drawn at random.
        seed: of these.
        report: called after each row.

    Raises:
        DataError: if the source cannot be read.
    """
    return _Summarizer(Summary(source), reading, measure, show, Random(seed)).run(report)


class _Summarizer:
    def __init__(self, summary: Summary, reading: Reading, measure: Measure | None, show: int, random: Random) -> None:
        self.summary, self.columns, self.measure = summary, reading.columns, measure
        self.show, self.random = show, random
        self.loader = reading.loader(summary.source)
        self.media = MediaCheck(self.loader)
        self.mentions: list[tuple[str, str]] = []
        self.format_notes: dict[str, list[str]] = {}

    def run(self, report: Callable[[], None]) -> Summary:
        summary = self.summary
        for row in summary.source.all_rows():
            try:
                self._add(row)
            except VLMError as error:
                summary.num_problems += 1
                if len(summary.problems) < MOST_SHOWN:
                    summary.problems.append(Problem.of(row, str(error)))
            report()
        order = {name: i for i, name in enumerate(summary.source.shards)}
        summary.examples.sort(key=lambda x: (order.get(x.record.shard, 0), x.record.line))
        told = [format_note(note, places) for note, places in self.format_notes.items()]
        summary.notes = [*told, *mention_notes(self.mentions)]
        return summary

    def _add(self, row: Row) -> None:
        """Count a row.

        Raises:
            VLMError: if it cannot be used; nothing of it is then counted.
        """
        summary = self.summary
        record = read_record(row, summary.source.name, self.columns)
        self.media.check(record.sources, thorough=len(summary.problems) < MOST_SHOWN)
        context = [part for segment in record.segments if not segment.is_target for part in segment.parts]
        mentions = [(record.place, name) for name in find_mentions(context, self.loader)]
        sizes = [self.loader.measure(medium.source) for medium in record.sources if medium.kind == "image"]
        measured = None if self.measure is None else self.measure(record, self.loader)
        self.mentions += mentions[: _MOST_MENTIONS - len(self.mentions)]
        for note in record.notes:
            self.format_notes.setdefault(note, []).append(record.place)
        summary.rows += 1
        summary.formats[record.format] += 1
        summary.images[len(sizes)] += 1
        summary.clips[len(record.sources) - len(sizes)] += 1
        summary.turns[len(record.segments) // 2] += 1
        summary.systems += record.system is not None
        summary.sizes.update(sizes)
        if record.id != f"{record.unit} {record.line}":
            summary.ids[record.id] += 1
        for name, length in _lengths(record, measured).items():
            summary.lengths.setdefault(name, []).append(length)
        self._draw(record, measured)

    def _draw(self, record: Record, measured: Measured | None) -> None:
        """Keep a record to show, so that each one so far is kept with the same chance."""
        examples = self.summary.examples
        place = len(examples) if len(examples) < self.show else self.random.randrange(self.summary.rows)
        if place < self.show:
            pieces = split_record(record) if measured is None else measured.show()
            examples[place : place + 1] = [Example(record, pieces, measured)]


def _lengths(record: Record, measured: Measured | None) -> dict[str, int]:
    """Return what is counted of a record."""
    if measured is not None:
        return {"positions": measured.positions, "tokens": measured.tokens, "learned tokens": measured.learned}
    learned = sum(_characters(segment.parts) for segment in record.segments if segment.is_target)
    read = sum(_characters(segment.parts) for segment in record.segments if not segment.is_target)
    return {"characters": read + learned + len(record.system or ""), "learned characters": learned}


def _characters(parts: Sequence[Any]) -> int:
    return sum(len(part.text) for part in parts if isinstance(part, Text))
