"""The text that a composition puts around each clip and each of its frames, such as their times.

With `clip_text: "{frames} frames at {times} s of {seconds} s: {views}"`, a clip of two seconds becomes

    3 frames at 0.00, 0.96, 1.96 s of 2.00 s: <video>

and with `frame_text: "Frame{number}: {image}"` and `between_frames_text: "\\n"`, each frame is a medium of its own:

    Frame1: <video>        frame 0 of the clip
    Frame2: <video>        frame 24
    Frame3: <video>        frame 49

It is text of the prompt, as if the user had typed it: other than the texts of tiles, it differs from clip to clip.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from vlm_cli.errors import MediaError
from vlm_cli.media import short_name
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.number_words import spell

if TYPE_CHECKING:
    from vlm_cli.composition.tiling import TilingOptions
    from vlm_cli.media import ChosenFrames, LoadedClip, LoadedImage
    from vlm_cli.templates.conversation import Encoder

__all__ = ["add_clip_texts", "chosen_of", "split_clips"]

_PLACE = re.compile(r"\{(\w+)\}")


def add_clip_texts(
    parts: Sequence[Text | Medium], processor: Encoder, choose: Callable[[str], ChosenFrames]
) -> list[Text | Medium]:
    """Put the composition's texts around each clip of a prompt, and around each of its frames.

    Args:
        parts: the prompt, in reading order.
        processor: of the model, which knows the texts.
        choose: says which frames of a clip are read, from its source.

    Raises:
        MediaError: if a text names times, and the frames of a clip have none.
    """
    if not any(isinstance(part, Medium) and part.kind == "video" for part in parts):
        return list(parts)
    options: TilingOptions = processor.image_processor.tiling.options
    if options.clip_text == "{views}" and options.frame_text is None:
        return list(parts)
    written: list[Text | Medium] = []
    for part in parts:
        if isinstance(part, Medium) and part.kind == "video":
            written += _write(options, part, choose(part.source))
        else:
            written.append(part)
    return written


def split_clips(media: Sequence[LoadedImage | LoadedClip], processor: Encoder) -> Sequence[LoadedImage | LoadedClip]:
    """Return loaded media as `add_clip_texts` writes them: a clip per frame, if the composition has a text for each."""
    from vlm_cli.media import LoadedClip

    if processor.image_processor.tiling.options.frame_text is None:
        return media
    return [one for x in media for one in (x.split() if isinstance(x, LoadedClip) else [x])]


def chosen_of(media: Iterable[LoadedImage | LoadedClip]) -> Callable[[str], ChosenFrames]:
    """Return what says which frames of loaded clips were read, for `add_clip_texts`."""
    from vlm_cli.media import LoadedClip

    return {clip.source: clip.chosen for clip in media if isinstance(clip, LoadedClip)}.__getitem__


def _write(options: TilingOptions, clip: Medium, chosen: ChosenFrames) -> Iterator[Text | Medium]:
    """Yield the texts around a clip, and the clip or its frames."""
    values = {"frames": str(len(chosen.indices)), "frames_in_words": spell(len(chosen.indices))}
    if chosen.seconds is not None and chosen.duration is not None:
        minutes, seconds = divmod(int(chosen.duration), 60)
        values |= {
            "seconds": f"{chosen.duration:.2f}",
            "times": ", ".join(f"{x:.2f}" for x in chosen.seconds),
            "duration": f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}",
        }
    for part in _fill(options.clip_text, "clip_text", values, "views", clip):
        if part is clip and options.frame_text is not None:
            yield from _write_frames(options, clip, chosen)
        else:
            yield part


def _write_frames(options: TilingOptions, clip: Medium, chosen: ChosenFrames) -> Iterator[Text | Medium]:
    """Yield each frame of a clip as a medium, and the texts around and between them."""
    from vlm_cli.media import name_frame

    assert options.frame_text is not None
    for i, index in enumerate(chosen.indices):
        if i and options.between_frames_text:
            yield Text(options.between_frames_text)
        values = {"number": str(i + 1)}
        if chosen.seconds is not None:
            minutes, seconds = divmod(int(chosen.seconds[i]), 60)
            values |= {"seconds": f"{chosen.seconds[i]:.2f}", "time": f"{minutes:02d}:{seconds:02d}"}
        frame = Medium(name_frame(clip.source, index), "video")
        yield from _fill(options.frame_text, "frame_text", values, "image", frame)


def _fill(
    template: str, setting: str, values: Mapping[str, str], place: str, medium: Medium
) -> Iterator[Text | Medium]:
    """Yield the parts of a template, with a medium in its place.

    Raises:
        MediaError: if the template names times, and there are none.
    """
    for i, piece in enumerate(_PLACE.split(template)):
        if i % 2 and piece == place:
            yield medium
        elif i % 2 and piece not in values:
            raise MediaError(
                f"{short_name(medium.source)!r} is a folder of frames, which have no times, but the model's {setting} "
                f"names {{{piece}}}. Give a video file or an animation."
            )
        elif text := values[piece] if i % 2 else piece:
            yield Text(text)
