"""Find the file that a user means by a name that only looks like its own.

A name may write an accented letter as one character or as two (NFC and NFD), and a space as another kind of space:
macOS puts a narrow one into the names of screenshots.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from pathlib import Path

from vlm_cli.errors import VLMWarning

__all__ = ["find_lookalike", "find_named"]


def find_named(path: str | Path) -> Path:
    """Return the path that a user named, `~` expanded, or the only one that looks the same, with a `VLMWarning`."""
    named = Path(os.path.expanduser(path))  # other than Path.expanduser, it takes an unknown user's ~ for a name
    found = find_lookalike(named)
    if found is None:
        return named
    message = f"there is no {str(path)!r}, so vlm takes {str(found)!a}, whose name looks the same."
    warnings.warn(message, VLMWarning, stacklevel=2)
    return found


def find_lookalike(file: Path) -> Path | None:
    """Return the only file whose path looks the same, if the file itself does not exist.

    >>> from tempfile import mkdtemp
    >>> folder = Path(mkdtemp())
    >>> (folder / "a\\u202fb.png").touch()
    >>> find_lookalike(folder / "a b.png").name
    'a\\u202fb.png'
    """
    name = str(file)
    if name.isascii() and " " not in name:
        return None  # no other text looks like this one
    try:
        if os.path.lexists(file):
            return None
        missing = next(p for p in [*reversed(file.absolute().parents), file.absolute()] if not os.path.lexists(p))
        rest = file.absolute().parts[len(missing.parts) - 1 :]
        found = missing.parent
        for name in rest:
            alike = [x for x in os.listdir(found) if _look(x) == _look(name)]
            if len(alike) != 1:
                return None
            found = found / alike[0]
    except (OSError, ValueError, StopIteration):
        return None
    return found


def _look(name: str) -> str:
    """Return what a name looks like: composed characters, and plain spaces for all kinds of spaces."""
    composed = unicodedata.normalize("NFC", name)
    return "".join(" " if unicodedata.category(c) == "Zs" else c for c in composed)
