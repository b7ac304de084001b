r"""The prompt grammar: text with images in it, as a user types it.

    A photo of <image:cat.png> and one of <image>.

`<image:PATH>` stands for that file. A bare `<image>` takes the next of the files that the user gives
beside the prompt. What plainly means one, such as `<video:PATH>`, `<img:PATH>` or `<Image:PATH>`, is an error.
Anything else is text, `<images>`, `<image >` and `<IMAGE>` included.

A backslash is an ordinary character except in front of what it can escape: `<image>`, `<image:` or `<video:`
in text, `>` in a path. There, two backslashes stand for one, and a single one that is left over escapes:

    \<image>            the text <image>
    \\<image>           a backslash, then a placeholder
    \n <images\>        unchanged
    <image:a\>b.png>    the file a>b.png
    <image:C:\a\b.png>  the file C:\a\b.png
    <image:C:\a\\>      the path C:\a\

So every text and every path has exactly one spelling (an empty path, or a path with a line break, has
none), and `format` is the inverse of `parse`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from vlm_cli.errors import PromptError

__all__ = ["Interleaved", "Medium", "Slot", "Text", "escape", "format", "interleave", "parse"]


@dataclass(frozen=True)
class Text:
    """Text that the language model reads."""

    text: str


@dataclass(frozen=True)
class Medium:
    """An image: a path, URL, `data:` URI, or `-` for standard input (see `media`)."""

    source: str


@dataclass(frozen=True)
class Slot:
    """A bare `<image>`, which takes the next file; `offset` is the number of characters before it."""

    offset: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Interleaved:
    """Texts and images in reading order. No text is empty, and no text follows another text directly.

    `images_prepended` is true if the prompt had no placeholder, so that all images stand before the text.
    """

    parts: list[Text | Medium]
    images_prepended: bool = False


_Part: TypeAlias = Text | Medium | Slot
_P = TypeVar("_P", bound=Text | Medium | Slot)

# The lookbehind makes a run of backslashes one try, not one for each of them.
_OPENER = re.compile(
    r"(?<!\\)(?P<slashes>\\*)"
    r"(?P<opener><image[>:]|(?P<near><[ \t]*(?i:images?|img|pictures?|photos?|videos?|audio)[ \t]*:))"
)
_PATH_STOP = re.compile(r"(?<!\\)(?P<slashes>\\*)(?P<stop>[>\r\n])")


def parse(prompt: str) -> list[Text | Medium | Slot]:
    r"""Split a prompt at its placeholders, and unescape its texts.

    >>> parse(r"A \<image> is <image:cat.png>.")
    [Text(text='A <image> is '), Medium(source='cat.png'), Text(text='.')]

    Raises:
        PromptError: if a placeholder is not closed on its line, its path is empty, or it has another name.
    """
    parts: list[_Part] = []
    position = 0
    while found := _OPENER.search(prompt, position):
        parts.append(Text(prompt[position : found.start()]))
        slashes, opener = found["slashes"], found["opener"]
        start, position = found.start("opener"), found.end()
        parts.append(Text(slashes[: len(slashes) // 2]))
        if len(slashes) % 2:
            parts.append(Text(opener))
        elif found["near"]:
            raise _near_miss(prompt, start, opener)
        elif opener == "<image>":
            parts.append(Slot(start))
        else:
            source, position = _read_path(prompt, start, position)
            parts.append(Medium(source))
    parts.append(Text(prompt[position:]))
    return _merge_texts(parts)


def format(parts: Iterable[Text | Medium | Slot]) -> str:
    r"""Write parts as a prompt that `parse` reads back.

    >>> format([Text("a <image> \\"), Slot(), Medium("b>.png")])
    'a \\<image> \\\\<image><image:b\\>.png>'

    Raises:
        PromptError: if a path is empty or has a line break, which no prompt can spell.
    """
    merged = _merge_texts(parts)
    pieces = []
    for index, part in enumerate(merged):
        if isinstance(part, Slot):
            pieces.append("<image>")
        elif isinstance(part, Medium):
            pieces.append(f"<image:{_escape_path(part.source)}>")
        elif index + 1 < len(merged):  # a placeholder follows, which backslashes at the end would touch
            pieces.append(_double_trailing_slashes(escape(part.text)))
        else:
            pieces.append(escape(part.text))
    return "".join(pieces)


def escape(text: str) -> str:
    r"""Write text as a prompt in which nothing is a placeholder.

    Escape a whole text at once, because two pieces of it may spell a placeholder together. To write a
    text next to a placeholder, use `format`.

    >>> escape("the tag <image>")
    'the tag \\<image>'
    """
    return _OPENER.sub(r"\g<slashes>\g<slashes>\\\g<opener>", text)


def interleave(prompt: str, images: Sequence[str] = (), *, given_with: str = "--image") -> Interleaved:
    """Replace each placeholder of a prompt by its image.

    Args:
        prompt: text with placeholders; without any, all images come first.
        images: one source for each bare `<image>`, in order.
        given_with: the option or field with which the user gave `images`, for messages.

    Raises:
        PromptError: if the prompt is empty or cannot be read, or placeholders and files do not match.
    """
    parts = parse(prompt)
    texts = [part for part in parts if isinstance(part, Text)]
    if len(texts) < len(parts):
        _check_counts(prompt, parts, images, given_with)
        files = iter(images)
        return Interleaved([Medium(next(files)) if isinstance(part, Slot) else part for part in parts])
    if not images and not prompt.strip():
        raise PromptError(
            f"the prompt is empty: got {_quote(prompt)}. Give some text, or a file with {given_with} or <image:FILE>."
        )
    return Interleaved([*map(Medium, images), *texts], images_prepended=bool(images))


def _read_path(prompt: str, opened: int, start: int) -> tuple[str, int]:
    """Read a path from `start` to its closing `>`; return the path, and the position after the `>`."""
    pieces = []
    position = start
    while found := _PATH_STOP.search(prompt, position):
        if found["stop"] != ">":
            break
        slashes = found["slashes"]
        pieces += [prompt[position : found.start()], slashes[: len(slashes) // 2]]
        position = found.end()
        if len(slashes) % 2:
            pieces.append(">")
        elif source := "".join(pieces):
            return source, position
        else:
            raise PromptError(
                f"the placeholder <image:> {_where(prompt, opened)} names no file. "
                r"Write <image:FILE>, a bare <image> for the next file given beside the prompt, "
                r"or \<image:> for the literal text."
            )
    raise _not_closed(prompt, opened, found.start("stop") if found else len(prompt))


def _near_miss(prompt: str, start: int, opener: str) -> PromptError:
    name = opener.strip("<: \t").lower()
    frames = " vlm reads still images only: give frames of a video as images." if name.startswith("video") else ""
    return PromptError(
        f"{opener}…> {_where(prompt, start)} is no placeholder.{frames} Write <image:FILE>, or \\{opener} for the "
        "literal text."
    )


def _not_closed(prompt: str, opened: int, end: int) -> PromptError:
    given = prompt[opened:end]
    hint = ""
    if r"\>" in given:
        hint = r" In a path, \> is a literal '>', so one that ends in a backslash is closed by \\>."
    return PromptError(
        f"the placeholder {_where(prompt, opened)} is not closed on its line: got {_quote(given)}. "
        rf"Write <image:FILE>, or \<image: for the literal text.{hint}"
    )


def _escape_path(source: str) -> str:
    if not source or "\n" in source or "\r" in source:
        what = "with a line break" if source else "without characters"
        raise PromptError(
            f"a path {what} cannot be written in a prompt: got {_quote(source)}. "
            "Write a bare <image>, and give the file beside the prompt."
        )
    return _double_trailing_slashes(re.sub(r"(?<!\\)(\\*)>", r"\1\1\\>", source))


def _double_trailing_slashes(source: str) -> str:
    return source + source[len(source.rstrip("\\")) :]


def _merge_texts(parts: Iterable[_P]) -> list[_P | Text]:
    """Join neighbouring texts, and drop empty ones."""
    merged: list[_P | Text] = []
    run: list[str] = []
    for part in parts:
        if isinstance(part, Text):
            run.append(part.text)
            continue
        merged += [Text(text)] if (text := "".join(run)) else []
        merged.append(part)
        run.clear()
    return merged + ([Text(text)] if (text := "".join(run)) else [])


def _check_counts(prompt: str, parts: Sequence[Text | Medium | Slot], images: Sequence[str], given_with: str) -> None:
    slots = [part for part in parts if isinstance(part, Slot)]
    if len(slots) == len(images):
        return
    has = f"the prompt has {_count(len(slots), 'bare <image> placeholder')}"
    given = f"{_count(len(images), 'file')} {'was' if len(images) == 1 else 'were'} given with {given_with}"
    if len(slots) > len(images):
        others = len(slots) - len(images) - 1
        more = f", like {'the one' if others == 1 else f'the {others}'} after it" if others else ""
        raise PromptError(
            f"{has} but {given}: the {_ordinal(len(images) + 1)} placeholder, "
            f"{_where(prompt, slots[len(images)].offset)}, has no file{more}. "
            rf"Give it one with {given_with}, write <image:FILE>, or write \<image> for the literal text."
        )
    extra = images[len(slots) :]
    more = f", and {len(extra) - 1} more" if len(extra) > 1 else ""
    raise PromptError(
        f"{has} but {given}: the {_ordinal(len(slots) + 1)} file, {_quote(extra[0])}{more}, "
        "has no placeholder. Write <image> in the prompt where it belongs, or leave the file out."
    )


def _where(prompt: str, offset: int) -> str:
    """Name a position as editors do, counting from 1: 'at character 7', or 'at line 2, character 7'."""
    line = prompt.count("\n", 0, offset) + 1
    column = offset - (prompt.rfind("\n", 0, offset) + 1) + 1
    return f"at character {column}" if line == 1 else f"at line {line}, character {column}"


def _quote(text: str, limit: int = 60) -> str:
    """Quote a text, cut to `limit` characters."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _ordinal(number: int) -> str:
    """Write an ordinal number: 1st, 2nd, 3rd, 4th, 11th, 21st."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
