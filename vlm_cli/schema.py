"""Say what a value from a file or a user must be, and find the values that are something else.

    checkpoint = mapping({"step": whole(0, 10**9)}, {"note": optional(text())})
    list(checkpoint.find_problems({"step": -1}))   # ["step must be a whole number from 0 to 1,000,000,000, but is -1."]

Every reader of a file uses this module, so that each message names the key, what it holds and what it must hold.
Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vlm_cli.errors import CheckpointError, VLMError

__all__ = [
    "ANYTHING",
    "Kind",
    "check",
    "choice",
    "either",
    "is_finite",
    "list_of",
    "mapping",
    "mapping_of",
    "number",
    "optional",
    "show",
    "text",
    "truth",
    "whole",
]

_SHOWN_CHARACTERS = 60  # of a value in a message
_SHOWN_PROBLEMS = 8  # of a file in one message


@dataclass(frozen=True)
class Kind:
    """What a value must be.

    Attributes:
        words: what it must be, as a message says it: "a whole number from 1 to 8".
        fits: whether a value is that, leaving aside what it holds inside.
        inside: finds the problems inside a value that fits; gets the value and its key.
    """

    words: str
    fits: Callable[[Any], bool]
    inside: Callable[[Any, str], Iterator[str]] | None = None

    def find_problems(self, value: Any, key: str = "") -> Iterator[str]:
        """Give one sentence for each problem of a value.

        Args:
            value: the value.
            key: its dotted key, which the sentences name; empty for a whole file.
        """
        if not self.fits(value):
            yield f"{key or 'the content'} must be {self.words}, but is {show(value)}."
        elif self.inside is not None:
            yield from self.inside(value, key)


def check(value: Any, kind: Kind, file: str, error: type[VLMError] = CheckpointError) -> None:
    """Check what a file holds.

    Args:
        value: what was read from the file.
        kind: what it must be.
        file: how the message names the file, such as "'my-vlm/config.json'".
        error: class of the error.

    Raises:
        VLMError: of the class `error`, with the first problems.
    """
    found = list(islice(kind.find_problems(value), _SHOWN_PROBLEMS + 1))
    if not found:
        return
    more = " More problems follow." if len(found) > _SHOWN_PROBLEMS else ""
    raise error(f"{file} is not valid: {' '.join(found[:_SHOWN_PROBLEMS])}{more}")


def show(value: Any) -> str:
    """Write a value in at most 60 characters: texts in quotes, all other values as JSON has them.

    >>> show(None), show("cat"), show([1, 2]), show(float("nan"))
    ('null', "'cat'", '[1, 2]', 'nan')
    >>> show(10**30)
    'a number of 31 digits'
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"a number of {_count_digits(value)} digits"
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"a list of {len(value)} values"
    if isinstance(value, Mapping) and len(value) > 4:
        return f"a mapping of {len(value)} keys"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return _shorten(repr(value[: _SHOWN_CHARACTERS + 1]))
    if isinstance(value, (list, tuple)):
        return _shorten(f"[{', '.join(map(show, value))}]")
    if isinstance(value, Mapping):
        return _shorten(f"{{{', '.join(f'{show(k)}: {show(x)}' for k, x in value.items())}}}")
    return _shorten(json.dumps(value, ensure_ascii=False, default=lambda x: type(x).__name__))


def _count_digits(value: int) -> int:
    """Count the decimal digits of a whole number; Python refuses to write one of more than 4,300."""
    digits = int(value.bit_length() * math.log10(2))
    return digits + (abs(value) >= 10**digits)


def _shorten(shown: str) -> str:
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}…"


def is_finite(value: Any) -> bool:
    """Tell whether a value is a number that a computer calculates with: no text, no true, no NaN, no infinity.

    >>> is_finite(1), is_finite(True), is_finite(float("inf")), is_finite(10**400)
    (True, False, False, False)
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


# -- kinds -------------------------------------------------------------------------------------------------------------


ANYTHING = Kind("any value", lambda value: True)


def whole(least: int, most: int) -> Kind:
    """A whole number of a range."""

    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Kind(f"a whole number from {least:,} to {most:,}", fits)


def number(least: float, most: float, *, above: bool = False) -> Kind:
    """A number of a range; with `above`, `least` itself is not in the range."""

    def fits(value: Any) -> bool:
        return is_finite(value) and least <= value <= most and not (above and value == least)

    words = f"a number above {least:g}, at most {most:g}" if above else f"a number from {least:g} to {most:g}"
    return Kind(words, fits)


def text(*, most: int = 4096, empty: bool = False) -> Kind:
    """A text of at most so many characters."""
    words = "a text" if empty else "a text that is not empty"

    def fits(value: Any) -> bool:
        return isinstance(value, str) and len(value) <= most and (empty or bool(value))

    return Kind(f"{words}, of at most {most:,} characters", fits)


def truth() -> Kind:
    """True or false."""
    return Kind("true or false", lambda value: isinstance(value, bool))


def choice(*values: str) -> Kind:
    """One of several texts."""
    return Kind(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def optional(kind: Kind) -> Kind:
    """A value of a kind, or null."""

    def inside(value: Any, key: str) -> Iterator[str]:
        if value is not None and kind.inside is not None:
            yield from kind.inside(value, key)

    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.fits(value), inside)


def either(*kinds: Kind) -> Kind:
    """A value of one of several kinds."""

    def inside(value: Any, key: str) -> Iterator[str]:
        kind = next(kind for kind in kinds if kind.fits(value))
        if kind.inside is not None:
            yield from kind.inside(value, key)

    return Kind(" or ".join(kind.words for kind in kinds), lambda value: any(k.fits(value) for k in kinds), inside)


def list_of(kind: Kind, *, least: int = 0, most: int = 1_000_000) -> Kind:
    """A list whose elements are all of a kind."""

    def inside(value: Any, key: str) -> Iterator[str]:
        for i, x in enumerate(value):
            yield from kind.find_problems(x, f"{key}[{i}]")

    words = f"a list of {least:,} to {most:,} values" if least else f"a list of at most {most:,} values"
    return Kind(words, lambda value: isinstance(value, (list, tuple)) and least <= len(value) <= most, inside)


def mapping(required: Mapping[str, Kind], given: Mapping[str, Kind] | None = None) -> Kind:
    """A mapping.

    Args:
        required: keys that must be in it.
        given: keys that may be in it. Keys of neither table may hold anything.
    """
    known = {**required, **(given or {})}

    def inside(value: Any, key: str) -> Iterator[str]:
        for name, kind in known.items():
            place = f"{key}.{name}" if key else name
            if name in value:
                yield from kind.find_problems(value[name], place)
            elif name in required:
                yield f"{place} is missing; it must be {kind.words}."

    return Kind("a mapping of keys to values", lambda value: isinstance(value, Mapping), inside)


def mapping_of(kind: Kind, *, least: int = 0, keys: Iterable[str] = ()) -> Kind:
    """A mapping whose values are all of a kind; if `keys` are given, its keys are among them."""
    known = tuple(keys)

    def inside(value: Any, key: str) -> Iterator[str]:
        for name, x in value.items():
            shown = str(name)[:_SHOWN_CHARACTERS]
            place = f"{key}.{shown}" if key else shown
            if known and name not in known:
                yield f"{place} is not known. Known: {', '.join(known)}."
            else:
                yield from kind.find_problems(x, place)

    words = "a mapping of keys to values" if not least else f"a mapping of at least {least} keys to values"

    def fits(value: Any) -> bool:
        return isinstance(value, Mapping) and len(value) >= least

    return Kind(words, fits, inside)
