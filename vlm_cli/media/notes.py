"""Count what becomes of pictures when they are decoded, so that a run over many says each kind once."""

from __future__ import annotations

from collections.abc import Iterable

from vlm_cli.media.sources import short_name

__all__ = ["NoteTally"]


class NoteTally:
    """Notes of pictures, such as "first frame of an animation", by kind.

    >>> tally = NoteTally()
    >>> tally.add("a.gif", ["first frame of an animation"])
    >>> tally.add("b.png", ["on a white ground"])
    >>> tally.add("c.gif", ["first frame of an animation"])
    >>> tally.add("c.gif", ["first frame of an animation"])
    >>> tally.lines()
    ['2 images, such as a.gif: first frame of an animation', 'Image b.png: on a white ground']
    """

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[str, str, set[str]]] = {}  # kind -> first note, first source, all sources

    def add(self, source: str, notes: Iterable[str]) -> None:
        """Count the notes of a picture; the same picture counts once."""
        for note in notes:
            kind = note.partition("'")[0]  # a note may quote a name
            self._kinds.setdefault(kind, (note, source, set()))[2].add(source)

    def lines(self) -> list[str]:
        """Return one line for each kind of note, with the number of pictures and the first of them."""
        return [
            f"Image {short_name(source)}: {note}"
            if len(sources) == 1
            else f"{len(sources):,} images, such as {short_name(source)}: {note}"
            for note, source, sources in self._kinds.values()
        ]
