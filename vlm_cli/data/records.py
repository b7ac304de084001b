"""Read the records that a model learns from or is tested on: one JSON object per line, in one of the `formats`."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import Any

from vlm_cli.data.formats import ColumnMap, Format, recognise
from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.meant import find_mentions, mention_notes
from vlm_cli.data.record import Record, Segment
from vlm_cli.data.sources import Row, Source, open_source
from vlm_cli.errors import DataError, MediaError, PromptError, VLMError
from vlm_cli.media import MediaLoader, short_name
from vlm_cli.media.decode import check_header
from vlm_cli.media.sources import INSIDE
from vlm_cli.printable import count_of
from vlm_cli.prompt import Medium

__all__ = [
    "MOST_SHOWN",
    "PLAIN_READING",
    "MediaCheck",
    "Problem",
    "Reading",
    "Record",
    "Records",
    "Segment",
    "describe_problems",
    "raise_problems",
    "read_record",
    "read_records",
]

MOST_SHOWN = 20  # bad lines that a message lists


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used.

    Attributes:
        line: number of the row in its shard.
        message: the reason.
        shard: name of the file; empty for the only one.
        unit: what messages call a row.
    """

    line: int
    message: str
    shard: str = ""
    unit: str = "line"

    @classmethod
    def of(cls, row: Row | Record, message: str) -> Problem:
        """Make the problem of a row, or of the record that was made of it."""
        number = row.line if isinstance(row, Record) else row.number
        return cls(number, message, row.shard, row.unit)


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


def describe_problems(problems: Iterable[Problem], total: int, origin: Source) -> str:
    """List bad rows.

    Args:
        problems: at least one.
        total: number of rows in the source.
        origin: the source.
    """
    shards, name = list(origin.shards), origin.quoted
    order = {shard: i for i, shard in enumerate(shards)}
    problems = sorted(problems, key=lambda p: (order.get(p.shard, 0), p.line))
    head = (
        f"{len(problems)} of the {total} records in {name} cannot be used:"
        if total > 1
        else f"the only record in {name} cannot be used:"
    )

    def place(problem: Problem) -> str:
        return f"{problem.line} of {problem.shard}" if len(shards) > 1 else str(problem.line)

    lines = [f"  {p.unit} {place(p)}: {p.message}" for p in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        rest = [place(p) for p in problems[MOST_SHOWN:]]
        shown = ", ".join(rest[:MOST_SHOWN]) + (", …" if len(rest) > MOST_SHOWN else "")
        lines.append(f"  … and {len(rest)} more: {problems[0].unit}s {shown}")
    return "\n".join([head, *lines])


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


@dataclass
class MediaCheck:
    """Check each image and clip once, without decoding it."""

    loader: MediaLoader
    known: dict[Medium, str | None] = field(default_factory=dict)  # medium -> its problem, or None

    def check(self, media: Sequence[Medium], *, thorough: bool) -> None:
        """Check the images and clips of one record.

        Args:
            media: with paths or URIs.
            thorough: find out why an image cannot be read, which may take a while.

        Raises:
            RecordError: for the first one that cannot be read.
        """
        for medium in media:
            if medium not in self.known:
                self.known[medium] = self._find_problem(medium, thorough)
            if (problem := self.known[medium]) is not None:
                raise RecordError(problem)

    def _find_problem(self, medium: Medium, thorough: bool) -> str | None:
        source = medium.source
        if source.partition("?")[0] == "-" or source.lower().startswith(("http://", "https://")):
            return f"{short_name(source)!r} is no file: records name files or data: URIs. Download it first."
        if medium.kind == "video":
            return self._problem_of_clip(source)
        if self._has_image_header(source):
            return None
        if not thorough:
            return f"{short_name(source)!r} cannot be read."
        try:
            self.loader.load(source)
        except MediaError as error:
            return str(error)
        return None

    def _problem_of_clip(self, source: str) -> str | None:
        try:
            self.loader.count_frames(source)
        except (MediaError, PromptError) as error:
            return str(error)
        return None

    def _has_image_header(self, source: str) -> bool:
        try:
            if source.startswith(INSIDE):
                return check_header(io.BytesIO(self.loader.read(source)), self.loader.max_pixels)
            path = self.loader.find(source)
            if not path.is_file():
                return False
            with path.open("rb") as file:
                return check_header(file, self.loader.max_pixels)
        except (MediaError, OSError, ValueError):  # `MediaLoader` then says what is wrong
            return False
