r"""The prompt grammar: text with images and clips in it, as a user types it.

    A photo of <image:cat.png>, one of <image>, and a clip of <video:dog.mp4?frames=8>.

`<image:PATH>` shows that image, and `<video:PATH>` that clip (`media.request` reads what stands after a `?`). A bare
`<image>` or `<video>` takes the next of the images or clips that the user gives beside the prompt. What plainly means
one, such as `<videos:PATH>`, `<img:PATH>` or `<Image:PATH>`, is an error. Anything else is text, `<images>`, `<image >`
and `<IMAGE>` included.

A backslash is an ordinary character except in front of what it can escape: `<image>`, `<image:`, `<video>` or `<video:`
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
from typing import Literal, TypeAlias, TypeVar

from vlm_cli.errors import PromptError

__all__ = [
    "KINDS",
    "Interleaved",
    "Kind",
    "Medium",
    "Slot",
    "Text",
    "TokenBreak",
    "escape",
    "format",
    "interleave",
    "parse",
]

Kind: TypeAlias = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")


@dataclass(frozen=True)
class Text:
    """Text that the language model reads."""

    text: str


@dataclass(frozen=True)
class Medium:
    """An image or a clip: a path, URL, `data:` URI, or `-` for standard input (see `media`)."""

    source: str
    kind: Kind = "image"

    @property
    def is_stdin(self) -> bool:
        """Whether standard input brings the file."""
        return self.source == "-" or (self.kind == "video" and self.source.startswith("-?"))


@dataclass(frozen=True)
class Slot:
    """A bare `<image>` or `<video>`, which takes the next file; `offset` is the number of characters before it."""

    offset: int = field(default=0, compare=False)
    kind: Kind = "image"


class TokenBreak:
    """An empty part of a prompt; no token reaches across it."""


@dataclass(frozen=True)
class Interleaved:
    """Texts, images and clips in reading order. No text is empty, and no text follows another text directly.

    `images_prepended` is true if the prompt had no placeholder, so that all images and clips stand before the text.
    """

    parts: list[Text | Medium]
    images_prepended: bool = False


_Part: TypeAlias = Text | Medium | Slot
_P = TypeVar("_P", bound=Text | Medium | Slot)

# The lookbehind makes a run of backslashes one try, not one for each of them.
_OPENER = re.compile(
    r"(?<!\\)(?P<slashes>\\*)"
    r"(?P<opener><(?P<kind>image|video)[>:]|(?P<near><[ \t]*(?i:images?|img|pictures?|photos?|videos?|audio)[ \t]*:))"
)
_PATH_STOP = re.compile(r"(?<!\\)(?P<slashes>\\*)(?P<stop>[>\r\n])")


def parse(prompt: str) -> list[Text | Medium | Slot]:
    r"""Split a prompt at its placeholders, and unescape its texts.

    >>> parse(r"A \<image> is <image:cat.png>.")
    [Text(text='A <image> is '), Medium(source='cat.png', kind='image'), Text(text='.')]

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
        elif opener.endswith(">"):
            parts.append(Slot(start, _kind(found["kind"])))
        else:
            kind = _kind(found["kind"])
            source, position = _read_path(prompt, start, position, kind)
            parts.append(Medium(source, kind))
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
            pieces.append(f"<{part.kind}>")
        elif isinstance(part, Medium):
            pieces.append(f"<{part.kind}:{_escape_path(part)}>")
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


def interleave(
    prompt: str, images: Sequence[str] = (), videos: Sequence[str] = (), *, given_with: str = "--image"
) -> Interleaved:
    """Replace each placeholder of a prompt by its image or clip.

    Args:
        prompt: text with placeholders; without any, all images come first, then all clips.
        images: one source for each bare `<image>`, in order.
        videos: one source for each bare `<video>`, in order.
        given_with: the option or field with which the user gave `images`, for messages; that of `videos` has "video" in
            its name instead of "image".

    Raises:
        PromptError: if the prompt is empty or cannot be read, or placeholders and files do not match.
    """
    parts = parse(prompt)
    texts = [part for part in parts if isinstance(part, Text)]
    given: dict[Kind, Sequence[str]] = {"image": images, "video": videos}
    if len(texts) < len(parts):
        for kind in KINDS:
            _check_counts(prompt, parts, kind, given[kind], given_with.replace("image", kind))
        files = {kind: iter(given[kind]) for kind in KINDS}
        return Interleaved([Medium(next(files[p.kind]), p.kind) if isinstance(p, Slot) else p for p in parts])
    media = [Medium(source, kind) for kind in KINDS for source in given[kind]]
    if not media and not prompt.strip():
        raise PromptError(
            f"the prompt is empty: got {_quote(prompt)}. Give some text, or a file with {given_with} or <image:FILE>."
        )
    return Interleaved([*media, *texts], images_prepended=bool(media))


def _kind(word: str) -> Kind:
    return "video" if word == "video" else "image"


def _read_path(prompt: str, opened: int, start: int, kind: Kind) -> tuple[str, int]:
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
                f"the placeholder <{kind}:> {_where(prompt, opened)} names no file. "
                f"Write <{kind}:FILE>, a bare <{kind}> for the next file given beside the prompt, "
                rf"or \<{kind}:> for the literal text."
            )
    raise _not_closed(prompt, opened, found.start("stop") if found else len(prompt), kind)


def _near_miss(prompt: str, start: int, opener: str) -> PromptError:
    name = opener.strip("<: \t").lower()
    kind = "video" if name.startswith("video") else "image"
    return PromptError(
        f"{opener}…> {_where(prompt, start)} is no placeholder. Write <{kind}:FILE>, or \\{opener} for the literal "
        "text."
    )


def _not_closed(prompt: str, opened: int, end: int, kind: Kind) -> PromptError:
    given = prompt[opened:end]
    hint = ""
    if r"\>" in given:
        hint = r" In a path, \> is a literal '>', so one that ends in a backslash is closed by \\>."
    return PromptError(
        f"the placeholder {_where(prompt, opened)} is not closed on its line: got {_quote(given)}. "
        rf"Write <{kind}:FILE>, or \<{kind}: for the literal text.{hint}"
    )


def _escape_path(medium: Medium) -> str:
    source = medium.source
    if not source or "\n" in source or "\r" in source:
        what = "with a line break" if source else "without characters"
        raise PromptError(
            f"a path {what} cannot be written in a prompt: got {_quote(source)}. "
            f"Write a bare <{medium.kind}>, and give the file beside the prompt."
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


def _check_counts(
    prompt: str, parts: Sequence[Text | Medium | Slot], kind: Kind, files: Sequence[str], given_with: str
) -> None:
    slots = [part for part in parts if isinstance(part, Slot) and part.kind == kind]
    if len(slots) == len(files):
        return
    has = f"the prompt has {_count(len(slots), f'bare <{kind}> placeholder')}"
    given = f"{_count(len(files), 'file')} {'was' if len(files) == 1 else 'were'} given with {given_with}"
    if len(slots) > len(files):
        others = len(slots) - len(files) - 1
        more = f", like {'the one' if others == 1 else f'the {others}'} after it" if others else ""
        raise PromptError(
            f"{has} but {given}: the {_ordinal(len(files) + 1)} placeholder, "
            f"{_where(prompt, slots[len(files)].offset)}, has no file{more}. "
            rf"Give it one with {given_with}, write <{kind}:FILE>, or write \<{kind}> for the literal text."
        )
    extra = files[len(slots) :]
    more = f", and {len(extra) - 1} more" if len(extra) > 1 else ""
    raise PromptError(
        f"{has} but {given}: the {_ordinal(len(slots) + 1)} file, {_quote(extra[0])}{more}, "
        f"has no placeholder. Write <{kind}> in the prompt where it belongs, or leave the file out."
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
