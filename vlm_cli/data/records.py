"""Read the records that a model learns from or is tested on: one JSON object per line.

    {"prompt": "<image:a.png>What is it? Answer:", "completion": " A cat."}
    {"prompt": "<image>Caption:", "completion": " A cat.", "images": ["a.png"], "id": "7", "kind": "caption"}
    {"prompt": "<image:a.png>", "turns": [{"prompt": "How many?", "completion": " Two."}, …]}
    {"prompt": "<video>What happens?", "completion": " A cat jumps.", "videos": ["a.mp4?frames=4"]}
    {"text": "A page with <image:a.png> and the text that follows the image."}

Prompts and completions follow the grammar of `vlm generate` (see `prompt`): `\\<image>` is text, a relative path starts
at the folder of the file, a bare `<image>` takes the next file in "images", and a bare `<video>` the next in "videos".
Without any placeholder, the images and then the clips stand before the text. The model learns to write the completions;
of a "text", it learns everything after the first image or clip. A record may be text alone. Other keys have no effect,
but a key that plainly names pictures or clips is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_cli.data.inputs import base_folder, describe_input, read_lines
from vlm_cli.data.jsonl import RecordError, describe_type, get_field, parse_object
from vlm_cli.data.meant import check_picture_keys, find_mentions, mention_notes
from vlm_cli.errors import DataError, MediaError, PromptError, VLMError
from vlm_cli.media import MediaLoader, short_name
from vlm_cli.media.decode import check_header
from vlm_cli.prompt import KINDS, Kind, Medium, Slot, Text, parse
from vlm_cli.registry import suggest

__all__ = ["Problem", "Record", "Records", "Segment", "get_files", "raise_problems", "read_records"]

MOST_SHOWN = 20  # bad lines that a message lists


@dataclass(frozen=True)
class Segment:
    """Text and images that the model learns to write (`is_target`), or that it reads before a target."""

    parts: tuple[Text | Medium, ...]
    is_target: bool


@dataclass(frozen=True)
class Record:
    """One line of a file. Its segments alternate: context, target, context, target, …"""

    line: int  # number of the line, from 1
    id: str
    kind: str | None
    segments: tuple[Segment, ...]

    @property
    def sources(self) -> tuple[Medium, ...]:
        """The images and clips, in reading order."""
        return tuple(part for segment in self.segments for part in segment.parts if isinstance(part, Medium))


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
            record = _parse_record(line, raw)
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


def get_files(data: dict[str, Any], kind: Kind) -> list[str]:
    """Return the files that a record lists beside its texts, under "images" or "videos".

    Raises:
        RecordError: if that is not a list of names.
    """
    files = get_field(data, f"{kind}s", list, "a list of files", [])
    for file in files:
        if not isinstance(file, str) or not file:
            raise RecordError(f'"{kind}s" must be a list of files, got {file!r} in it.')
    return list(files)


def _parse_record(line: int, raw: bytes) -> Record:
    """Parse one line.

    Raises:
        RecordError: if the line is no record.
    """
    data = parse_object(raw)
    identity = get_field(data, "id", (str, int), "text or a number", None)
    kind = get_field(data, "kind", str, "text", None)
    return Record(line, f"line {line}" if identity is None else str(identity), kind, tuple(_find_segments(data)))


def _find_segments(data: dict[str, Any]) -> list[Segment]:
    """Split a record into contexts and targets."""
    forms = [key for key in ("text", "prompt") if key in data]
    if not forms:
        known = ("prompt", "text")
        near = next((hint for key in data if (hint := suggest(key, known))), "")
        raise RecordError(f'has neither "prompt" nor "text".{near}')
    if len(forms) > 1:
        raise RecordError('has both "text" and "prompt". Give a "text", or a "prompt" with its "completion".')
    if "completion" in data and "turns" in data:
        raise RecordError('has both "completion" and "turns". Give one of them.')
    texts = [("text", get_field(data, "text", str, "text"))] if forms == ["text"] else _collect_texts(data)
    check_picture_keys(data, [text for _, text in texts])
    parsed = _insert_files(texts, {kind: get_files(data, kind) for kind in KINDS})
    return _split_text(parsed[0][1]) if forms == ["text"] else _pair_segments(parsed)


def _collect_texts(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (key, text) of each prompt and completion, in reading order."""
    prompt = get_field(data, "prompt", str, "text")
    if "turns" not in data:
        return [("prompt", prompt), ("completion", _get_completion(data))]
    texts: list[tuple[str, str]] = []
    turns = get_field(data, "turns", list, "a list of objects")
    if not turns:
        raise RecordError('"turns" is empty. Give at least one {"prompt": …, "completion": …}.')
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RecordError(f"turn {number} must be an object, got {describe_type(turn)}.")
        try:
            texts += [("prompt", get_field(turn, "prompt", str, "text")), ("completion", _get_completion(turn))]
            check_picture_keys(turn, [text for _, text in texts], in_turn=True)
        except RecordError as error:
            raise RecordError(f"turn {number}: {error}") from None
    # The record's own prompt stands before its first turn.
    return [("prompt", prompt), *texts]


def _get_completion(data: dict[str, Any]) -> str:
    completion: str = get_field(data, "completion", str, "text")
    if not completion.strip():
        raise RecordError(f'"completion" is empty, got {completion!r}: the model would have nothing to learn.')
    return completion


def _insert_files(
    texts: Sequence[tuple[str, str]], files: Mapping[Kind, Sequence[str]]
) -> list[tuple[str, list[Text | Medium]]]:
    """Parse each text, and give each bare placeholder the next of the images or of the clips."""
    parsed = [(key, _parse_text(key, text)) for key, text in texts]
    if not any(not isinstance(part, Text) for _, parts in parsed for part in parts):  # the files come first
        key, parts = parsed[0]
        parsed[0] = (key, [*(Slot(kind=kind) for kind in KINDS for _ in files[kind]), *parts])
    for kind in KINDS:
        slots = sum(isinstance(part, Slot) and part.kind == kind for _, parts in parsed for part in parts)
        given = len(files[kind])
        if slots != given:
            raise RecordError(
                f"has {slots} bare <{kind}> placeholder{'' if slots == 1 else 's'}, but {given} "
                f'file{"" if given == 1 else "s"} in "{kind}s". Give one for each, or write <{kind}:FILE>.'
            )
    left = {kind: iter(files[kind]) for kind in KINDS}
    return [
        (key, [Medium(next(left[p.kind]), p.kind) if isinstance(p, Slot) else p for p in parts])
        for key, parts in parsed
    ]


def _parse_text(key: str, text: str) -> list[Text | Medium | Slot]:
    try:
        parts = parse(text)
    except PromptError as error:
        raise RecordError(f'"{key}": {error}') from None
    if key == "completion" and any(not isinstance(part, Text) for part in parts):
        raise RecordError(
            r'"completion" has a placeholder; images and clips belong in prompts. For the text, write \<image>.'
        )
    return parts


def _split_text(parts: Sequence[Text | Medium]) -> list[Segment]:
    """Split a "text" after its first image: context, target. Without an image, all of it is target."""
    first = next((i for i, part in enumerate(parts) if isinstance(part, Medium)), -1)
    rest = tuple(parts[first + 1 :])
    if not any(isinstance(part, Text) and part.text.strip() for part in rest):
        what = "is empty" if first < 0 else "ends with its images"
        raise RecordError(f'"text" {what}: the model would have nothing to learn.')
    return [Segment(tuple(parts[: first + 1]), False), Segment(rest, True)]


def _pair_segments(parsed: Sequence[tuple[str, list[Text | Medium]]]) -> list[Segment]:
    """Pair each completion with the prompts before it, which together are its context."""
    result: list[Segment] = []
    context: list[Text | Medium] = []
    for key, parts in parsed:
        if key == "prompt":
            context += parts
        else:
            result += [Segment(tuple(context), False), Segment(tuple(parts), True)]
            context = []
    return result


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
