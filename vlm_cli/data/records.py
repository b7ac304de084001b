"""Records to learn from: one JSON object a line.

    {"prompt": "<image:a.png>What is it? Answer:", "completion": " A cat."}
    {"prompt": "<image>Caption:", "completion": " A cat.", "images": ["a.png"], "id": "7", "kind": "caption"}
    {"prompt": "<image:a.png>", "turns": [{"prompt": "How many?", "completion": " Two."}, …]}
    {"text": "A page with <image:a.png> and what is written after it."}

Prompts and completions are read as `vlm generate` reads a prompt (see `prompt`): `\\<image>` is text, paths start at
the file's folder, a bare `<image>` takes the next of "images", and without any placeholder the images come first.
`vlm train` learns completions and, of a text, everything after its first image. It ignores other keys.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_cli.errors import DataError, MediaError, PromptError, VLMError
from vlm_cli.media import MAX_PIXELS, MediaLoader, short_name
from vlm_cli.prompt import Medium, Slot, Text, parse
from vlm_cli.registry import suggest

__all__ = [
    "Problem",
    "Record",
    "RecordError",
    "Records",
    "Segment",
    "get_field",
    "get_images",
    "parse_object",
    "raise_problems",
    "read_lines",
    "read_records",
]

MOST_SHOWN = 20  # bad lines that a message lists


@dataclass(frozen=True)
class Segment:
    """Text and images that the model learns to write (`is_target`), or reads before them."""

    parts: tuple[Text | Medium, ...]
    is_target: bool


@dataclass(frozen=True)
class Record:
    """One line. Its segments alternate: context, target, context, target, …"""

    line: int  # of the file, from 1
    id: str
    kind: str | None
    segments: tuple[Segment, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Where its images come from, in order."""
        return tuple(part.source for segment in self.segments for part in segment.parts if isinstance(part, Medium))


@dataclass(frozen=True)
class Problem:
    """Why a line cannot be used."""

    line: int
    message: str


@dataclass
class Records:
    """What a file holds.

    Attributes:
        path: the file.
        good: records that can be used.
        problems: one for each other line.
        sha256: of the file.
    """

    path: Path
    good: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    sha256: str = ""

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self.path.absolute().parent


def read_records(path: Path) -> Records:
    """Read and check every record; of images, only the head is read.

    Raises:
        DataError: if the file cannot be read or is empty. Bad lines are no error yet.
    """
    records = Records(path)
    images = _ImageCheck(records.folder)
    digest = hashlib.sha256()
    for line, raw in enumerate(read_lines(path), start=1):
        digest.update(raw)
        if not raw.strip():
            continue
        try:
            record = _record(line, raw)
            images.check(record.sources, thorough=len(records.problems) < MOST_SHOWN)
        except (VLMError, RecordError) as error:
            records.problems.append(Problem(line, str(error)))
        else:
            records.good.append(record)
    if not records.good and not records.problems:
        raise DataError(
            f"{str(path)!r} holds no records. Write one JSON object a line: "
            '{"prompt": "<image:a.png>Caption:", "completion": " A cat."}'
        )
    records.sha256 = digest.hexdigest()
    return records


def raise_problems(records: Records, more: Iterable[Problem] = ()) -> None:
    """
    Raises:
        DataError: with every bad line, if there is one.
    """
    problems = sorted([*records.problems, *more], key=lambda p: p.line)
    if not problems:
        return
    total = len(records.good) + len(records.problems)
    head = (
        f"{len(problems)} of the {total} records in {str(records.path)!r} cannot be used:"
        if total > 1
        else f"the only record in {str(records.path)!r} cannot be used:"
    )
    lines = [f"  line {p.line}: {p.message}" for p in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        rest = [str(p.line) for p in problems[MOST_SHOWN:]]
        shown = ", ".join(rest[:MOST_SHOWN]) + (", …" if len(rest) > MOST_SHOWN else "")
        lines.append(f"  … and {len(rest)} more: lines {shown}")
    raise DataError("\n".join([head, *lines]))


class RecordError(Exception):
    """A line that is no record."""


def read_lines(path: Path) -> Iterator[bytes]:
    """
    Raises:
        DataError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from file
    except IsADirectoryError:
        raise DataError(f"{str(path)!r} is a directory. Give the JSONL file in it.") from None
    except FileNotFoundError:
        folder = path.absolute().parent
        near = [x.name for x in folder.iterdir() if x.is_file()] if folder.is_dir() else []
        raise DataError(f"cannot find the records {str(path)!r}.{suggest(path.name, near)}") from None
    except OSError as error:
        raise DataError(f"cannot read the records {str(path)!r}: {error.strerror}.") from None


def _record(line: int, raw: bytes) -> Record:
    """
    Raises:
        RecordError: for anything but a record.
    """
    data = parse_object(raw)
    identity = get_field(data, "id", (str, int), "text or a number", None)
    kind = get_field(data, "kind", str, "text", None)
    return Record(line, f"line {line}" if identity is None else str(identity), kind, tuple(_pieces(data)))


def parse_object(raw: bytes) -> dict[str, Any]:
    """The object on a line.

    Raises:
        RecordError: for anything else.
    """
    try:
        data = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 text: byte {error.start + 1} is {raw[error.start]:#04x}.") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error.msg} at character {error.colno}.") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise RecordError(f"not JSON: {error}.") from None
    except RecursionError:
        raise RecordError("not a record: it is nested too deeply.") from None
    if not isinstance(data, dict):
        raise RecordError(f"not a record: expected an object, {{…}}, got {_kind(data)}.")
    return data


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


_MISSING = object()


def get_field(data: dict[str, Any], key: str, types: Any, words: str, default: Any = _MISSING) -> Any:
    """The value of a key, of the right type.

    Raises:
        RecordError: for another type, or if it is missing and has no default.
    """
    value = data.get(key, default)
    if value is _MISSING:
        known = [x for x in data if x not in ("id", "kind", "images")]
        raise RecordError(f'has no "{key}".{suggest(key, known)}')
    if value is default:
        return value
    if not isinstance(value, types) or isinstance(value, bool):
        raise RecordError(f'"{key}" must be {words}, got {_kind(value)}.')
    return value


def _pieces(data: dict[str, Any]) -> list[Segment]:
    forms = [key for key in ("text", "prompt") if key in data]
    if not forms:
        known = ("prompt", "text")
        near = next((hint for key in data if (hint := suggest(key, known))), "")
        raise RecordError(f'has neither "prompt" nor "text".{near}')
    if len(forms) > 1:
        raise RecordError('has both "text" and "prompt". Give a "text", or a "prompt" with its "completion".')
    if "completion" in data and "turns" in data:
        raise RecordError('has both "completion" and "turns". Give one of them.')
    given = [("text", get_field(data, "text", str, "text"))] if forms == ["text"] else _prompts(data)
    segments = _with_images(given, get_images(data))
    if not any(isinstance(part, Medium) for _, parts in segments for part in parts):
        raise RecordError('has no image. Write <image:FILE> in it, or list files in "images".')
    return _split_text(segments[0][1]) if forms == ["text"] else _paired(segments)


def _prompts(data: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, text) of each prompt and completion, in order."""
    prompt = get_field(data, "prompt", str, "text")
    if "turns" not in data:
        return [("prompt", prompt), ("completion", _completion(data))]
    given: list[tuple[str, str]] = []
    turns = get_field(data, "turns", list, "a list of objects")
    if not turns:
        raise RecordError('"turns" is empty. Give at least one {"prompt": …, "completion": …}.')
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise RecordError(f"turn {number} must be an object, got {_kind(turn)}.")
        try:
            given += [("prompt", get_field(turn, "prompt", str, "text")), ("completion", _completion(turn))]
        except RecordError as error:
            raise RecordError(f"turn {number}: {error}") from None
    # A record's own prompt leads to its first turn.
    return [("prompt", prompt), *given]


def _completion(data: dict[str, Any]) -> str:
    completion = get_field(data, "completion", str, "text")
    if not completion.strip():
        raise RecordError(f'"completion" is empty, got {completion!r}: there is nothing to learn.')
    return completion


def get_images(data: dict[str, Any]) -> list[str]:
    """The files that a record lists beside its texts."""
    images = get_field(data, "images", list, "a list of files", [])
    for image in images:
        if not isinstance(image, str) or not image:
            raise RecordError(f'"images" must be a list of files, got {image!r} in it.')
    return list(images)


def _with_images(given: Sequence[tuple[str, str]], images: Sequence[str]) -> list[tuple[str, list[Text | Medium]]]:
    """Parse each text and give each bare placeholder its image."""
    parsed = [(key, _parse(key, text)) for key, text in given]
    slots = sum(isinstance(part, Slot) for _, parts in parsed for part in parts)
    placed = any(not isinstance(part, Text) for _, parts in parsed for part in parts)
    if not placed:  # the images come first
        slots, (key, parts) = len(images), parsed[0]
        parsed[0] = (key, [*(Slot() for _ in images), *parts])
    if slots != len(images):
        raise RecordError(
            f"has {slots} bare <image> placeholder{'' if slots == 1 else 's'}, but {len(images)} "
            f'file{"" if len(images) == 1 else "s"} in "images". Give one for each, or write <image:FILE>.'
        )
    files = iter(images)
    return [(k, [Medium(next(files)) if isinstance(p, Slot) else p for p in parts]) for k, parts in parsed]


def _parse(key: str, text: str) -> list[Text | Medium | Slot]:
    try:
        parts = parse(text)
    except PromptError as error:
        raise RecordError(f'"{key}": {error}') from None
    if key == "completion" and any(not isinstance(part, Text) for part in parts):
        raise RecordError(
            r'"completion" has an image placeholder; images belong in prompts. For the text, write \<image>.'
        )
    return parts


def _split_text(parts: Sequence[Text | Medium]) -> list[Segment]:
    first = next(i for i, part in enumerate(parts) if isinstance(part, Medium))
    rest = tuple(parts[first + 1 :])
    if not any(isinstance(part, Text) and part.text.strip() for part in rest):
        raise RecordError('"text" ends with its images: there is nothing after them to learn.')
    return [Segment(tuple(parts[: first + 1]), False), Segment(rest, True)]


def _paired(segments: Sequence[tuple[str, list[Text | Medium]]]) -> list[Segment]:
    """Context and completion by turns; prompts that follow each other are one context."""
    result: list[Segment] = []
    context: list[Text | Medium] = []
    for key, parts in segments:
        if key == "prompt":
            context += parts
        else:
            result += [Segment(tuple(context), False), Segment(tuple(parts), True)]
            context = []
    return result


@dataclass
class _ImageCheck:
    """Looks at each image once, without decoding it."""

    folder: Path
    known: dict[str, str | None] = field(default_factory=dict)

    def check(self, sources: Sequence[str], *, thorough: bool) -> None:
        """
        Raises:
            RecordError: for the first that cannot be read; its reason is looked up if `thorough`.
        """
        for source in sources:
            if source not in self.known:
                self.known[source] = self._problem(source, thorough)
            if (problem := self.known[source]) is not None:
                raise RecordError(problem)

    def _problem(self, source: str, thorough: bool) -> str | None:
        if source == "-" or source.lower().startswith(("http://", "https://")):
            return f"{short_name(source)!r} is no file: records name files or data: URIs. Download it first."
        if self._has_image_head(source):
            return None
        if not thorough:
            return f"{short_name(source)!r} cannot be read."
        try:
            MediaLoader(self.folder).load(source)
        except MediaError as error:
            return str(error)
        return None

    def _has_image_head(self, source: str) -> bool:
        from PIL import Image

        path = self.folder / os.path.expanduser(source)
        try:
            if not path.is_file():
                return False
            with Image.open(path) as image:
                return 0 < image.width * image.height <= MAX_PIXELS
        except Exception:  # `MediaLoader` says what it is
            return False
