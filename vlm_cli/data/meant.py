"""Find pictures that a user plainly means, where vlm reads none: under another key, or as words or tags of a text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.sources.base import Embedded
from vlm_cli.errors import MediaError, PromptError
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import Medium, Slot, Text, parse
from vlm_cli.prompt import format as format_prompt

__all__ = ["check_picture_keys", "find_mentions", "find_picture_keys", "mention_note", "mention_notes"]

_READ = ("images", "videos")  # keys of a record that vlm reads
#: Keys that name pictures in the data sets of other projects.
_PICTURE_KEY = re.compile(
    r"(input|source)?_?(image|img|picture|photo|video|audio|media)s?_?"
    r"(file|path|url|uri|name|filename|source|src|list|data|bytes|base64|b64)?s?",
    re.IGNORECASE,
)
_CLIP_NAME = re.compile(r"(?i).\.(mp4|m4v|mov|webm|mkv|avi)$")
_FILE_NAME = re.compile(
    rf"(?i).\.(png|jpe?g|jfif|gif|bmp|webp|tiff?|heic|heif|avif|jp2|jxl|ppm|pgm)$|{_CLIP_NAME.pattern[4:]}"
)
#: A tag that looks like a placeholder, and is none.
_TAG = re.compile(r"<[ \t]*(?i:images?|img|pictures?|photos?|videos?|audio)[ \t]*/?>")
_AROUND = "\"'`“”‘’«»()[]{}<>,;:!?*"  # characters that may stand around a file name in a sentence
_MOST_WORDS = 100  # of one text, for each of which the system looks for a file


def check_picture_keys(data: dict[str, Any], texts: Iterable[str], *, in_turn: bool = False) -> None:
    """Refuse a key that brings pictures under a name that vlm does not read.

    A key whose pictures the record shows in another way is left alone.

    Args:
        data: the object of one line, or of one turn in it.
        texts: prompts of the line.
        in_turn: whether the object is a turn, in which "images" has no meaning either.

    Raises:
        RecordError: naming the key.
    """
    shown = set[str]()
    for listed in () if in_turn else (data.get(key) for key in _READ):
        shown |= set(_texts_in(listed)) if isinstance(listed, list) else set()
    joined = "\n".join(texts)
    for key, value in data.items():
        if (key in _READ and not in_turn) or not _PICTURE_KEY.fullmatch(key):
            continue
        names = list(_texts_in(value))
        if names and not all(
            name in shown or re.search(f"<(image|video):{re.escape(name)}>", joined) for name in names
        ):
            place = ' beside "turns"' if in_turn else ""
            what, kind = ("clips", "video") if "video" in key.lower() else ("pictures", "image")
            raise RecordError(
                f'"{key}" is not read. Give {what}{place} as a list: "{kind}s": ["FILE", …], or write '
                f"<{kind}:FILE> in the prompt."
            )


def find_picture_keys(data: dict[str, Any]) -> list[str]:
    """Return the keys that plainly bring pictures or clips."""
    return [key for key, value in data.items() if _PICTURE_KEY.fullmatch(key) and any(_texts_in(value))]


def _texts_in(value: Any) -> Iterator[str]:
    """Yield the texts that are not empty in a value, and the names of its files, in its lists and in its objects."""
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Embedded):
        yield value.reference
    elif isinstance(value, (list, dict)):
        for x in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(x)


def find_mentions(parts: Sequence[Text | Medium | Slot], loader: MediaLoader) -> list[str]:
    """Return the words of a prompt that name pictures or clips which it does not show, and tags like `<IMAGE>`.

    Raises:
        PromptError: if the prompt is nothing but the name of such a file.
    """
    shown = {part.source.partition("?")[0] for part in parts if isinstance(part, Medium)}
    shown |= {part.source for part in parts if isinstance(part, Medium)}
    if len(parts) == 1 and isinstance(parts[0], Text) and _is_file(name := parts[0].text.strip(), loader):
        what, show, ask = ("clip", "clip", "What happens?") if _is_clip(name) else (
            "picture file", "picture", "Describe the image."
        )  # fmt: skip
        raise PromptError(
            f"the prompt is the name of a {what}, {name!r}, and would be read as text. To show the {show}, "
            f'write "{_placeholder(name)}{ask}"'
        )
    words = (word for part in parts if isinstance(part, Text) for word in _file_names(part.text))
    named = [word for word in dict.fromkeys(words) if word not in shown and _is_file(word, loader)]
    tags = (tag[0] for part in parts if isinstance(part, Text) for tag in _TAG.finditer(part.text))
    # A text that spells a placeholder is an escaped one.
    return named + [tag for tag in dict.fromkeys(tags) if isinstance(parse(tag)[0], Text)]


def mention_notes(mentions: Sequence[tuple[str, str]]) -> list[str]:
    """Return one note for each kind of what rows mention, with the number of rows.

    Args:
        mentions: what `find_mentions` found, each with the place of its row: `line 7 of a.jsonl`.
    """
    notes = []
    for kind in (False, True):
        of_kind = [(place, name) for place, name in mentions if _is_tag(name) is kind]
        if not of_kind:
            continue
        (place, name), more = of_kind[0], len({place for place, _ in of_kind}) - 1
        unit = place.partition(" ")[0]
        others = f" {more:,} more {f'{unit} does' if more == 1 else f'{unit}s do'} the same." if more else ""
        notes.append(mention_note(name, place) + others)
    return notes


def mention_note(name: str, where: str = "the prompt") -> str:
    """Return the note for a picture, a clip or a tag that a text names."""
    if _is_tag(name):
        what, kind = ("a clip", "video") if "video" in name.lower() else ("an image", "image")
        return f"Note: {where} has {name}, which is read as text. To show {what}, write <{kind}> or <{kind}:FILE>."
    what = "clip" if _is_clip(name) else "picture file"
    return f"Note: {where} names the {what} {name!r}, which is read as text. To show it, write {_placeholder(name)}."


def _placeholder(name: str) -> str:
    return format_prompt([Medium(name, "video" if _is_clip(name) else "image")])


def _is_tag(name: str) -> bool:
    return _TAG.fullmatch(name) is not None


def _file_names(text: str) -> list[str]:
    if "." not in text:
        return []
    words = (word.strip(_AROUND).rstrip(".").rstrip(_AROUND) for word in text.split())
    return [word for word in words if len(word) < 4096 and _FILE_NAME.search(word)][:_MOST_WORDS]


def _is_clip(name: str) -> bool:
    return _CLIP_NAME.search(name) is not None


def _is_file(name: str, loader: MediaLoader) -> bool:
    if not _FILE_NAME.search(name) or "\n" in name or "\r" in name:
        return False
    try:
        return os.path.isfile(loader.find(name))
    except (MediaError, OSError, ValueError):
        return False
