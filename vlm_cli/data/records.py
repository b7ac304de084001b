"""Read the records of a source: what a model learns from or is tested on, each in one of the `formats`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import Any

from vlm_cli.data.formats import ColumnMap, Format, recognise
from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.meant import find_mentions, mention_notes
from vlm_cli.data.media_check import MediaCheck
from vlm_cli.data.problems import MOST_SHOWN, Problem, describe_problems
from vlm_cli.data.record import Record, Segment
from vlm_cli.data.sources import Row, Source, open_source
from vlm_cli.errors import DataError, VLMError
from vlm_cli.media import MediaLoader
from vlm_cli.printable import count_of

__all__ = [
    "PLAIN_READING",
    "Reading",
    "Record",
    "Records",
    "Segment",
    "raise_problems",
    "read_record",
    "read_records",
]


@dataclass(frozen=True)
class Reading:
    """What a user says of the rows and pictures of a source.

    Attributes:
        media_root: the folder that holds every image; None allows each path.
        max_pixels: the most pixels that are decoded of one image; None takes the default of `MediaLoader`.
        image_folder: where relative paths of images start; None for the folder of the source.
        columns: which columns of a row are what; None recognises the format of each row.
    """

    media_root: Path | None = None
    max_pixels: int | None = None
    image_folder: Path | None = None
    columns: ColumnMap | None = None

    @classmethod
    def of(
        cls, media_root: Path | None, max_pixels: int | None, image_folder: Path | None, columns: str | None
    ) -> Reading:
        """Make it of what stands on the command line.

        Raises:
            UsageError: if the columns cannot be read.
        """
        return cls(media_root, max_pixels, image_folder, None if columns is None else ColumnMap.parse(columns))

    def to_dict(self) -> dict[str, Any]:
        """Return what the user said, the columns as on the command line."""
        return {**vars(self), "columns": None if self.columns is None else str(self.columns)}

    def loader(self, origin: Source, inside: Callable[[str], bytes] | None = None) -> MediaLoader:
        """Make a loader of the images of a source, which fetches nothing.

        Args:
            origin: the source.
            inside: returns the bytes of an image in a shard; None asks the source.
        """
        return MediaLoader(
            self.image_folder or origin.folder,
            media_root=self.media_root,
            max_pixels=self.max_pixels,
            inside=inside or origin.bytes_of,
        )


PLAIN_READING = Reading()


@dataclass
class Records:
    """The content of a source of records.

    Attributes:
        origin: the source.
        good: the records that can be used.
        problems: one problem for each row that cannot be used.
        sha256: hash of the source.
        reading: how the rows were read.
        mentions: picture files and tags that texts name without showing a picture, each with the place of its row.
        formats: how many of the good records are in which format.
        format_notes: for each note of a format, the places of the rows that it is about.
    """

    origin: Source
    reading: Reading = PLAIN_READING
    good: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    sha256: str = ""
    mentions: list[tuple[str, str]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    format_notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What the user should know about records that can be used."""
        return [self.summary, *starmap(format_note, self.format_notes.items()), *mention_notes(self.mentions)]

    @property
    def summary(self) -> str:
        """What the source is: `Data: a.json (JSON array, 24 rows): LLaVA conversations`."""
        known = self.formats.most_common()
        names = [name if len(known) == 1 else f"{count:,} {name}" for name, count in known]
        rows = ", ".join(x for x in (self.origin.detail, count_of(len(self.good), "row")) if x)
        return f"Data: {self.origin.name} ({self.origin.kind}, {rows}): {', '.join(names)}"

    def add(self, record: Record) -> None:
        """Count a record that can be used."""
        self.good.append(record)
        self.formats[record.format] += 1
        for note in record.notes:
            self.format_notes.setdefault(note, []).append(record.place)

    def loader(self) -> MediaLoader:
        """Make a loader of the images, which fetches nothing."""
        return self.reading.loader(self.origin)


def read_records(source: Path | str | Source, reading: Reading = PLAIN_READING) -> Records:
    """Read a source and check each record. Of an image or a clip, only the header is read.

    Bad rows are collected in `problems`; `raise_problems` turns them into an error.

    Args:
        source: what `open_source` opens, or an open source.
        reading: what the user says of its rows and pictures.

    Raises:
        DataError: if the source cannot be read or holds no record.
    """
    origin = source if isinstance(source, Source) else open_source(str(source))
    records = Records(origin, reading)
    media = MediaCheck(records.loader())
    for row in origin.all_rows():
        try:
            record = read_record(row, origin.name, reading.columns)
            media.check(record.sources, thorough=len(records.problems) < MOST_SHOWN)
            context = [part for segment in record.segments if not segment.is_target for part in segment.parts]
            records.mentions += [(record.place, name) for name in find_mentions(context, media.loader)]
        except VLMError as error:
            records.problems.append(Problem.of(row, str(error)))
        else:
            records.add(record)
    if not records.good and not records.problems:
        raise DataError(
            f"{origin.quoted} holds no records. Write one JSON object per line: "
            '{"prompt": "<image:a.png>Caption:", "completion": " A cat."}'
        )
    records.sha256 = origin.digest()
    return records


def raise_problems(records: Records, more: Iterable[Problem] = ()) -> None:
    """Raise one error that lists every bad row; do nothing if no row is bad.

    Args:
        records: the content of a source, with the problems that reading found.
        more: problems that the caller found in good records.

    Raises:
        DataError: if at least one row cannot be used.
    """
    if problems := [*records.problems, *more]:
        raise DataError(describe_problems(problems, len(records.good) + len(records.problems), records.origin))


def read_record(row: Row, source: str, format: Format | None = None) -> Record:
    """Make the record of a row.

    Args:
        row: of a source.
        source: the name of the source.
        format: of the row; None recognises it.

    Raises:
        RecordError: if the row is no record.
    """
    if row.problem is not None:
        raise RecordError(row.problem)
    format = format or recognise(row.data)
    content = format.read(row.data)
    return Record(
        line=row.number,
        id=f"{row.unit} {row.number}" if content.id is None else content.id,
        kind=content.kind,
        segments=content.segments,
        system=content.system,
        source=source,
        shard=row.shard,
        unit=row.unit,
        is_turns=content.is_turns,
        format=format.name,
        notes=content.notes,
        marking=content.marking,
    )


def format_note(note: str, places: Sequence[str]) -> str:
    """Write a note of a format, with its first row and the number of others."""
    more = len(places) - 1
    unit = places[0].partition(" ")[0]
    others = f" {more:,} more {f'{unit} does' if more == 1 else f'{unit}s do'} the same." if more else ""
    return f"Note: {places[0]} {note}.{others}"
