"""Tiny clips, written by PyAV and Pillow, whose frames can be told apart."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

__all__ = ["brightness", "frame", "write_animation", "write_video"]

SIZE = (48, 32)  # width and height of a frame


def frame(index: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """The frame with this index: as bright as its index says, with a red corner at the top left."""
    pixels = np.full((size[1], size[0], 3), 8 * index % 256, np.uint8)
    pixels[:8, :8] = 255, 0, 0
    return Image.fromarray(pixels)


def brightness(image: Image.Image) -> int:
    """The index of the frame that an image shows, whatever the codec made of its colours."""
    return round(np.asarray(image)[-8:, -8:].mean() / 8)


def write_video(
    count: int = 30,
    *,
    format: str = "mp4",
    codec: str = "mpeg4",
    rate: int = 10,
    key_every: int = 8,
    size: tuple[int, int] = SIZE,
    milliseconds: Sequence[int] | None = None,
    aspect: Fraction | None = None,
) -> bytes:
    """Encode a clip.

    Args:
        count: how many frames it has.
        format: of the container.
        codec: of the stream.
        rate: frames a second.
        key_every: frames from one key frame to the next.
        size: width and height in pixels.
        milliseconds: when each frame is shown; None for one each 1/rate seconds.
        aspect: of a pixel, width to height; None for square ones.
    """
    stream = io.BytesIO()
    with av.open(stream, "w", format=format) as container:
        video = container.add_stream(codec, rate=rate if milliseconds is None else 1000)
        video.width, video.height = size
        video.pix_fmt, video.codec_context.gop_size = "yuv420p", key_every
        if aspect is not None:
            video.codec_context.sample_aspect_ratio = aspect
        video.codec_context.thread_count, video.bit_rate = 1, 4_000_000
        for i in range(count):
            picture = av.VideoFrame.from_image(frame(i, size))
            picture.pts = i if milliseconds is None else milliseconds[i]
            picture.time_base = Fraction(1, rate if milliseconds is None else 1000)
            container.mux(video.encode(picture))
        container.mux(video.encode())
    return stream.getvalue()


def write_animation(count: int, format: str, milliseconds: int | list[int] = 100) -> bytes:
    """Encode an animated GIF, WebP or PNG file without loss."""
    first, *rest = [frame(i) for i in range(count)]
    stream = io.BytesIO()
    first.save(
        stream, format, save_all=True, append_images=rest, duration=milliseconds, loop=0, lossless=True, disposal=1
    )
    return stream.getvalue()
