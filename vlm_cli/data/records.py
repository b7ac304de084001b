"""Read the records that a model learns from or is tested on: one JSON object per line, in one of the `formats`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm_cli.data.formats import read_content
from vlm_cli.data.inputs import base_folder, describe_input, read_lines
from vlm_cli.data.jsonl import RecordError, parse_object
from vlm_cli.data.meant import find_mentions, mention_notes
from vlm_cli.data.record import Record, Segment
from vlm_cli.errors import DataError, MediaError, PromptError, VLMError
from vlm_cli.media import MediaLoader, short_name
from vlm_cli.media.decode import check_header
from vlm_cli.prompt import Medium

__all__ = ["Problem", "Record", "Records", "Segment", "raise_problems", "read_records"]

MOST_SHOWN = 20  # bad lines that a message lists


@dataclass(frozen=True)
class Problem:
    """Why a line cannot be used."""

    line: int
    message: str


@dataclass
class Records:
    """The content of a file of records.

    Attributes:
        path: the file.
        good: the records that can be used.
        problems: one problem for each line that cannot be used.
        sha256: hash of the file.
        media_root: the folder that holds every image; None allows each path.
        mentions: picture files and tags that texts name without showing a picture, each with the number of its line.
        max_pixels: the most pixels that are decoded of one image; None takes the default of `MediaLoader`.
    """

    path: Path
    good: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    sha256: str = ""
    media_root: Path | None = None
    max_pixels: int | None = None
    mentions: list[tuple[int, str]] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What the user should know about records that can be used."""
        name = describe_input(self.path).replace("{", "{{").replace("}", "}}")
        return mention_notes(self.mentions, f"line {{}} of {name}")

    @property
    def folder(self) -> Path:
        """The folder where relative paths start."""
        return base_folder(self.path)

    def loader(self) -> MediaLoader:
        """Make a loader of the images, which fetches nothing."""
        return MediaLoader(self.folder, media_root=self.media_root, max_pixels=self.max_pixels)


def read_records(path: Path, media_root: Path | None = None, max_pixels: int | None = None) -> Records:
    """Read a file and check each record. Of an image or a clip, only the header is read.

    Bad lines are collected in `problems`; `raise_problems` turns them into an error.

    Args:
        path: the file.
        media_root: the folder that holds every image; None allows each path.
        max_pixels: the most pixels that are decoded of one image; None takes the default of `MediaLoader`.

    Raises:
        DataError: if the file cannot be read or holds no record.
    """
    records = Records(path, media_root=media_root, max_pixels=max_pixels)
    media = _MediaCheck(records.loader())
    digest = hashlib.sha256()
    for line, raw in enumerate(read_lines(path), start=1):
        digest.update(raw)
        if not raw.strip():
            continue
        try:
            content = read_content(parse_object(raw))
            identity = f"line {line}" if content.id is None else content.id
            record = Record(line, identity, content.kind, content.segments, content.system)
            media.check(record.sources, thorough=len(records.problems) < MOST_SHOWN)
            context = [part for segment in record.segments if not segment.is_target for part in segment.parts]
            records.mentions += [(line, name) for name in find_mentions(context, media.loader)]
        except VLMError as error:
            records.problems.append(Problem(line, str(error)))
        else:
            records.good.append(record)
    if not records.good and not records.problems:
        raise DataError(
            f"{describe_input(path)} holds no records. Write one JSON object per line: "
            '{"prompt": "<image:a.png>Caption:", "completion": " A cat."}'
        )
    records.sha256 = digest.hexdigest()
    return records


def raise_problems(records: Records, more: Iterable[Problem] = ()) -> None:
    """Raise one error that lists every bad line; do nothing if no line is bad.

    Args:
        records: the content of a file, with the problems that reading found.
        more: problems that the caller found in good records.

    Raises:
        DataError: if at least one line cannot be used.
    """
    problems = sorted([*records.problems, *more], key=lambda p: p.line)
    if not problems:
        return
    total = len(records.good) + len(records.problems)
    head = (
        f"{len(problems)} of the {total} records in {describe_input(records.path)} cannot be used:"
        if total > 1
        else f"the only record in {describe_input(records.path)} cannot be used:"
    )
    lines = [f"  line {p.line}: {p.message}" for p in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        rest = [str(p.line) for p in problems[MOST_SHOWN:]]
        shown = ", ".join(rest[:MOST_SHOWN]) + (", …" if len(rest) > MOST_SHOWN else "")
        lines.append(f"  … and {len(rest)} more: lines {shown}")
    raise DataError("\n".join([head, *lines]))


@dataclass
class _MediaCheck:
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
            path = self.loader.find(source)
            if not path.is_file():
                return False
            with path.open("rb") as file:
                return check_header(file, self.loader.max_pixels)
        except (MediaError, OSError, ValueError):  # `MediaLoader` then says what is wrong
            return False
