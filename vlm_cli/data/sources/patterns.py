"""Patterns that name many shards: `train-{000..012}.tar`, `{a,b}.parquet` and `data/*.parquet`."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from vlm_cli.errors import DataError

__all__ = ["expand_pattern", "is_pattern"]

_MOST = 1_000_000  # shards
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
_BRACES = re.compile(r"\{([^{}]*)\}")


def is_pattern(text: str) -> bool:
    """Tell whether a name may stand for many."""
    return bool(re.search(r"[*?\[]|\{[^{}]*(,|\.\.)[^{}]*\}", text))


def expand_pattern(text: str) -> list[Path]:
    """Return the files that a pattern names, in order.

    Raises:
        DataError: if there are none, or one that braces name is absent.
    """
    paths: list[Path] = []
    for name in _expand_braces(text):
        if re.search(r"[*?\[]", name):
            paths += [Path(x) for x in sorted(glob.glob(name, recursive=True)) if Path(x).is_file()]
        elif Path(name).is_file():
            paths.append(Path(name))
        else:
            raise DataError(f"cannot find {name!r}, one of the shards of {text!r}.")
        if len(paths) > _MOST:
            raise DataError(f"{text!r} names more than {_MOST:,} files.")
    if not paths:
        raise DataError(f"no file matches {text!r}.")
    return list(dict.fromkeys(paths))


def _expand_braces(text: str) -> Iterator[str]:
    """Yield the names that braces stand for, as a shell does.

    >>> list(_expand_braces("{a,b}-{08..10}"))
    ['a-08', 'a-09', 'a-10', 'b-08', 'b-09', 'b-10']
    """
    for found in _BRACES.finditer(text):
        if (choices := _choices(found[1])) is not None:
            for choice in choices:
                for rest in _expand_braces(text[found.end() :]):
                    yield text[: found.start()] + choice + rest
            return
    yield text


def _choices(inside: str) -> Iterator[str] | None:
    if found := _RANGE.fullmatch(inside):
        first, last, width = int(found[1]), int(found[2]), len(found[1])
        return (str(i).zfill(width) for i in range(first, last + 1))
    return iter(inside.split(",")) if "," in inside else None
