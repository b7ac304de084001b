"""Controls: the same questions with another picture or with none, which show what a model guesses without looking."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias, get_args

from vlm_cli.data.record import Segment
from vlm_cli.errors import DataError, MediaError, PromptError, UsageError
from vlm_cli.evaluation.items import Item
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import Kind, Medium, Text
from vlm_cli.registry import suggest

__all__ = ["CONTROLS", "Control", "control_items", "parse_control"]

Control: TypeAlias = Literal["wrong-image", "no-image"]
CONTROLS: tuple[Control, ...] = get_args(Control)

Parts: TypeAlias = tuple[Text | Medium, ...]


def parse_control(text: str) -> Control:
    """Read `--control`.

    Raises:
        UsageError: if there is no such control.
    """
    found = next((x for x in CONTROLS if x == text), None)
    if found is None:
        raise UsageError(f"unknown --control {text!r}.{suggest(text, CONTROLS)} Known: {', '.join(CONTROLS)}.")
    return found


def control_items(items: Sequence[Item], control: Control, loader: MediaLoader) -> None:
    """Give items another picture each, or none.

    "wrong-image" puts another picture or clip of these items in the place of each: one that is half of them further on,
    so that neighbours in a file, which may be similar, do not meet. Files of the same content count as one. "no-image"
    takes all pictures and clips away.

    Args:
        items: not encoded yet; they are changed.
        control: which one.
        loader: finds images.

    Raises:
        DataError: if the items do not allow it.
    """
    media = [part for item in items for part in _parts(item) if isinstance(part, Medium)]
    if not media:
        raise DataError(f"--control {control} needs questions with pictures, and no item shows one.")
    other = _other_media(media, loader) if control == "wrong-image" else {}
    for item in items:
        item.prompt = _replace(item.prompt, other)
        item.earlier = tuple(replace(turn, parts=_replace(turn.parts, other)) for turn in item.earlier)
        if not any(isinstance(part, Medium) or part.text.strip() for part in item.prompt):
            raise DataError(
                f"--control {control} leaves nothing of the prompt of {item.record.place}, which is only a picture."
            )


def _parts(item: Item) -> Parts:
    turns = (*item.earlier, Segment(item.prompt, False))
    return tuple(part for turn in turns for part in turn.parts)


def _replace(parts: Parts, other: Mapping[Medium, Medium]) -> Parts:
    """Put other media in the places of the media of a text; leave out those that have none."""
    found: list[Text | Medium] = []
    for part in parts:
        if not isinstance(part, Medium):
            found.append(part)
        elif part in other:
            found.append(other[part])
    return tuple(found)


def _other_media(media: Sequence[Medium], loader: MediaLoader) -> dict[Medium, Medium]:
    """Return another picture for each picture, and another clip for each clip.

    Raises:
        DataError: if there is only one.
    """
    other: dict[Medium, Medium] = {}
    kinds: tuple[Kind, ...] = ("image", "video")
    for kind in kinds:
        distinct: dict[str, list[Medium]] = {}
        for medium in dict.fromkeys(x for x in media if x.kind == kind):
            distinct.setdefault(_identity(medium, loader), []).append(medium)
        groups = list(distinct.values())
        if len(groups) == 1:
            what = "picture" if kind == "image" else "clip"
            raise DataError(f"--control wrong-image needs two {what}s or more, and all items show the same one.")
        for i, group in enumerate(groups):
            stranger = groups[(i + len(groups) // 2) % len(groups)][0]
            other |= {medium: stranger for medium in group}
    return other


def _identity(medium: Medium, loader: MediaLoader) -> str:
    """Return a text that equal files share; the name of what cannot be read as one file, such as a folder of frames."""
    try:
        return hashlib.sha256(loader.read(medium.source)).hexdigest()
    except (MediaError, PromptError, OSError):
        return medium.source
