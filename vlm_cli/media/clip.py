"""What a clip is, whoever reads it: PyAV, Pillow, or a folder of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, Protocol

from vlm_cli.errors import MediaError
from vlm_cli.media.animation import FORMATS, Animation
from vlm_cli.media.opening import open_image
from vlm_cli.media.sources import MAX_BYTES
from vlm_cli.media.timeline import Timeline
from vlm_cli.media.video import VideoFile

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Clip", "open_clip"]


class Clip(Protocol):
    """An opened clip.

    Attributes:
        stated: how many frames its header says that it has; None if that takes reading the whole.
    """

    stated: int | None

    def timeline(self) -> Timeline:
        """Return when each frame is shown."""

    def read(self, chosen: Sequence[int]) -> Iterator[Image]:
        """Yield the frames with these indices, which ascend, upright, as RGB."""


def open_clip(file: BinaryIO, name: str, max_pixels: int | None) -> Clip:
    """Open a video file or an animated picture.

    Args:
        file: the open file.
        name: what messages call it.
        max_pixels: the most pixels of one frame; None takes `MAX_PIXELS`.

    Raises:
        MediaError: if the file is neither.
    """
    prefix = file.read(16)
    if not prefix:
        raise MediaError(f"{name} is empty (0 bytes); a clip was expected.")
    format = _picture_format(file)
    if format is None:
        return VideoFile(file, name, max_pixels)
    if format not in FORMATS:
        raise _still_error(name, format)
    file.seek(0)
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise MediaError(f"{name} is an animation of more than {MAX_BYTES:,} bytes. Save it as a video.")
    animation = Animation(data, name, max_pixels)
    if animation.stated == 1:
        raise _still_error(name, format)
    return animation


def _still_error(name: str, format: str) -> MediaError:
    return MediaError(f"{name} is a still image ({format}), and no clip. Write <image:FILE> to show it.")


def _picture_format(file: BinaryIO) -> str | None:
    """Return Pillow's name of the format of a picture file; None if the file is no picture."""
    file.seek(0)
    try:
        image = open_image(file)  # type: ignore[arg-type]
    except Exception:  # a damaged picture of a known format
        return None
    return None if image is None else image.format
