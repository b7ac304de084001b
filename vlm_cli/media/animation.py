"""The frames of an animated GIF, WebP, PNG or AVIF file, read by Pillow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from vlm_cli.errors import MediaError
from vlm_cli.media.decode import check_size, to_rgb
from vlm_cli.media.opening import open_image, unread_error
from vlm_cli.media.timeline import Timeline

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "Animation"]

FORMATS = ("GIF", "WEBP", "PNG", "AVIF")  # whose further pictures follow each other in time
MAX_DECODED = 2**34  # pixels of all frames; each frame is drawn over the one before it, so all of them are decoded
_MILLISECOND = Fraction(1, 1000)
_SHOWN = 100  # milliseconds that viewers show a frame whose file says 0


class Animation:
    """An animated picture as a clip.

    Args:
        data: the whole file.
        name: what messages call it.
        max_pixels: the most pixels of one frame; None takes `MAX_PIXELS`.

    Raises:
        MediaError: if the file is damaged, or has too many pixels.
    """

    def __init__(self, data: bytes, name: str, max_pixels: int | None) -> None:
        self.data, self.name = data, name
        image = None
        try:
            image = open_image(data)
            if image is None:
                raise EOFError("it has no header")
            check_size(image.size, name, max_pixels)
            self.stated: int | None = int(getattr(image, "n_frames", 1))
        except MediaError:
            raise
        except Exception as error:
            raise unread_error(error, image, name) from error
        self.width, self.height = image.size
        if self.stated * self.width * self.height > MAX_DECODED:
            raise MediaError(
                f"{name} is an animation of {self.stated:,} frames of {self.width} × {self.height} pixels, which take "
                "too long to draw. Scale it down first, or save it as a video."
            )

    def timeline(self) -> Timeline:
        """Return when each frame is shown."""
        ticks, now = [], 0
        for image in self._frames():
            ticks.append(now)
            now += max(0, round(float(image.info.get("duration") or 0))) or _SHOWN
        return Timeline(ticks, now, _MILLISECOND)

    def read(self, chosen: Sequence[int]) -> Iterator[Image]:
        """Yield the frames with these indices, which ascend, as RGB."""
        wanted = set(chosen)
        for index, image in enumerate(self._frames(max(chosen) + 1)):
            if index in wanted:
                yield to_rgb(image.copy(), self.name)

    def _frames(self, count: int | None = None) -> Iterator[Image]:
        """Yield the first frames of the file, each drawn over the one before it; the next one replaces it."""
        image = None
        try:
            image = open_image(self.data)
            assert image is not None and self.stated is not None
            for index in range(self.stated if count is None else count):
                image.seek(index)
                image.load()
                yield image
        except MediaError:
            raise
        except Exception as error:  # Pillow's plugins raise errors of any type
            raise unread_error(error, image, self.name) from error
