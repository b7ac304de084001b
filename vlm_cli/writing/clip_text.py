"""The text that a composition puts around each clip, such as the times of its frames.

With `clip_text: "{frames} frames at {times} s of {seconds} s: {views}"`, a clip of two seconds becomes

    3 frames at 0.00, 0.96, 1.96 s of 2.00 s: <video>

It is text of the prompt, as if the user had typed it: other than the texts of tiles, it differs from clip to clip.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from vlm_cli.errors import MediaError
from vlm_cli.media import short_name
from vlm_cli.prompt import Medium, Text

if TYPE_CHECKING:
    from vlm_cli.media import ChosenFrames, LoadedClip, LoadedImage
    from vlm_cli.processor import VLMProcessor

__all__ = ["add_clip_texts", "chosen_of"]

_PLACE = re.compile(r"\{(views|frames|seconds|times)\}")


def add_clip_texts(
    parts: Sequence[Text | Medium], processor: VLMProcessor, choose: Callable[[str], ChosenFrames]
) -> list[Text | Medium]:
    """Put the composition's text around each clip of a prompt.

    Args:
        parts: the prompt, in reading order.
        processor: of the model, which knows the text.
        choose: says which frames of a clip are read, from its source.

    Raises:
        MediaError: if the text names times, and the frames of a clip have none.
    """
    if not any(isinstance(part, Medium) and part.kind == "video" for part in parts):
        return list(parts)
    template: str = processor.image_processor.tiling.options.clip_text
    if template == "{views}":
        return list(parts)
    return [
        piece
        for part in parts
        for piece in (
            _fill(template, part, choose(part.source)) if isinstance(part, Medium) and part.kind == "video" else [part]
        )
    ]


def chosen_of(media: Iterable[LoadedImage | LoadedClip]) -> Callable[[str], ChosenFrames]:
    """Return what says which frames of loaded clips were read, for `add_clip_texts`."""
    from vlm_cli.media import LoadedClip

    return {clip.source: clip.chosen for clip in media if isinstance(clip, LoadedClip)}.__getitem__


def _fill(template: str, clip: Medium, chosen: ChosenFrames) -> list[Text | Medium]:
    values: dict[str, str | None] = {"frames": str(len(chosen.indices)), "seconds": None, "times": None}
    if chosen.seconds is not None and chosen.duration is not None:
        values |= {"seconds": f"{chosen.duration:.2f}", "times": ", ".join(f"{x:.2f}" for x in chosen.seconds)}
    pieces: list[Text | Medium] = []
    for i, piece in enumerate(_PLACE.split(template)):
        if i % 2 and piece == "views":
            pieces.append(clip)
            continue
        text = values[piece] if i % 2 else piece
        if text is None:
            raise MediaError(
                f"{short_name(clip.source)!r} is a folder of frames, which have no times, but the model's clip_text "
                f"names {{{piece}}}. Give a video file or an animation."
            )
        pieces += [Text(text)] if text else []
    return pieces
