"""Decode the bytes of an image to upright 8-bit RGB, whole or not at all.

A file that is cut short is an error, never a picture whose lower half is gray. Transparent parts show white, as in
viewers; what a file hides under full transparency is never seen. Pillow is imported on first use.
"""

from __future__ import annotations

import io
import math
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vlm_cli.errors import MediaError
from vlm_cli.media.jpeg import close_jpeg, is_progressive, scale_jpeg
from vlm_cli.media.jpeg2000 import has_all_tiles, scale_jpeg2000
from vlm_cli.media.opening import non_image_error, open_image, unread_error

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "MAX_PIXELS",
    "DecodedImage",
    "check_header",
    "check_size",
    "decode_image",
    "is_opaque",
    "measure_image",
    "on_white",
    "to_rgb",
]

MAX_PIXELS = 89_478_485  # pixels of one image; Pillow warns of a decompression bomb from here on

#: Formats whose further pictures are no part of a sequence: previews of a photograph, layers, sizes of an icon.
_ONE_PICTURE = ("MPO", "PSD", "ICNS", "ICO")


@dataclass(frozen=True)
class DecodedImage:
    """The first picture of a file, upright, as RGB.

    Attributes:
        image: may be smaller than the file says, if the file holds a large photograph.
        width: of the upright picture in the file, in pixels.
        height: the same.
        notes: what the user should know of the decoding, in words, such as "first frame of an animation".
    """

    image: Image
    width: int
    height: int
    notes: tuple[str, ...] = ()


def decode_image(data: bytes, name: str, max_pixels: int | None = None) -> DecodedImage:
    """Decode the first picture of an image file to upright RGB.

    Args:
        data: the whole file.
        name: what messages call it.
        max_pixels: the most pixels that are decoded; None takes `MAX_PIXELS`. A JPEG or JPEG 2000 file with more is
            decoded at a half, a quarter or an eighth of its size.

    Raises:
        MediaError: if `data` is no image, is damaged, has too many pixels, or is of a kind that Pillow does not read.
    """
    image = None
    try:
        image = open_image(data)
        if image is None:
            raise non_image_error(data, name)
        size = image.size
        _fit(image, name, max_pixels)
        if image.format == "EPS":  # Pillow would run Ghostscript to decode it
            raise MediaError(f"{name} is a PostScript program, and vlm runs none. Convert it to PNG.")
        if image.format == "JPEG2000" and not has_all_tiles(data):
            raise EOFError("its last tiles are missing")
        image = _load(image, data, name, max_pixels)
        return _finish(image, size, name)
    except MediaError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of any type
        raise unread_error(error, image, name) from error


def check_header(data: bytes | io.BufferedIOBase, max_pixels: int | None = None) -> bool:
    """Say whether the header of a file is one of an image that vlm reads, without decoding the image."""
    try:
        image = open_image(data)
        if image is None:
            return False
        _fit(image, "", max_pixels)
    except Exception:  # as in `decode_image`, which then says what is wrong
        return False
    return True


def measure_image(data: bytes, name: str, max_pixels: int | None = None) -> tuple[int, int]:
    """Return the width and height in pixels that `decode_image` tells, from the header alone.

    Args:
        data: the whole file.
        name: what messages call it.
        max_pixels: the most pixels that are decoded; None takes `MAX_PIXELS`.

    Raises:
        MediaError: if `data` is no image, or has too many pixels. A damaged image may have a whole header.
    """
    image = None
    try:
        image = open_image(data)
        if image is None:
            raise non_image_error(data, name)
        width, height = image.size
        _fit(image, name, max_pixels)
    except MediaError:
        raise
    except Exception as error:  # as in `decode_image`
        raise unread_error(error, image, name) from error
    # Pillow tells the size of a TIFF file as it will be when the picture stands upright.
    is_turned = image.format != "TIFF" and (_orientation(image) or 1) >= 5
    return (height, width) if is_turned else (width, height)


def _load(image: Image, data: bytes, name: str, max_pixels: int | None) -> Image:
    """Decode the pixels; a JPEG file that lacks no more than its end marker is whole."""
    try:
        image.load()
    except OSError:
        closed = close_jpeg(data, _limit(max_pixels)) if image.format in ("JPEG", "MPO") else None
        if closed is None or (image := cast("Image", open_image(closed))) is None:
            raise
        _fit(image, name, max_pixels)
        image.load()
    return image


def _finish(image: Image, size: tuple[int, int], name: str) -> DecodedImage:
    """Turn a decoded picture upright and into RGB, and note what became of it."""
    notes = []
    if image.size != size:
        notes.append(f"read at 1/{round(size[0] / image.width)} of its size")
    if not is_opaque(image):
        notes.append("on a white ground")
    upright, is_turned = _turn_upright(image)
    width, height = size[::-1] if is_turned else size
    rgb = to_rgb(upright, name)
    if _has_more_pictures(image):
        notes.append("first page of several" if image.format in ("TIFF", "DCX") else "first frame of an animation")
    return DecodedImage(rgb, width, height, tuple(notes))


def _limit(max_pixels: int | None) -> int:
    return MAX_PIXELS if max_pixels is None else max_pixels


def _fit(image: Image, name: str, max_pixels: int | None) -> None:
    """Refuse an image with too many pixels, or let Pillow decode a JPEG or JPEG 2000 file at a smaller size.

    Raises:
        MediaError: with the size, and the most that vlm reads.
    """
    limit = _limit(max_pixels)
    scale = {"JPEG": scale_jpeg, "MPO": scale_jpeg, "JPEG2000": scale_jpeg2000}.get(image.format or "")
    if image.width * image.height > limit and scale is not None and scale(image, limit):
        return
    kind = "progressive JPEG files, which decode at full size" if is_progressive(image) else "one image"
    check_size(image.size, name, max_pixels, kind)


def check_size(size: tuple[int, int], name: str, max_pixels: int | None, kind: str = "one image") -> None:
    """Refuse a picture or a frame without pixels, or with too many.

    Args:
        size: width and height.
        name: what messages call it.
        max_pixels: the most pixels; None takes `MAX_PIXELS`.
        kind: what has this limit.

    Raises:
        MediaError: with the size, and the most that vlm reads.
    """
    limit = _limit(max_pixels)
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{name} has no pixels: it is {width} × {height}. Save it again.")
    if width * height <= limit:
        return
    raise MediaError(
        f"{name} has too many pixels: it has {width} × {height} = {width * height:,} pixels; vlm reads at most "
        f"{limit:,} of {kind}, because a larger image may be a decompression bomb. Scale it down first, or "
        f"allow as many with --max-pixels {width * height}."
    )


def _has_more_pictures(image: Image) -> bool:
    """Tell whether the file holds a second frame or page. The image is of no more use afterwards."""
    if image.format in _ONE_PICTURE:
        return False
    try:
        image.seek(1)
    except EOFError:
        return False
    except Exception:  # there is one, although it cannot be read
        return True
    return image.tell() == 1


def _turn_upright(image: Image) -> tuple[Image, bool]:
    """Apply the EXIF orientation, and say whether width and height are swapped.

    An image whose EXIF cannot be read counts as upright, as in other viewers.
    """
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    orientation = _orientation(image)
    if orientation is None:
        return image, False
    return image.transpose(turns[orientation]), orientation >= 5


def _orientation(image: Image) -> int | None:
    """Return the EXIF orientation, from 2 to 8; None for an upright image, or one whose EXIF cannot be read."""
    try:
        found = image.getexif().get(0x0112)
    except Exception:  # as in `decode_image`
        return None
    return found if found in range(2, 9) else None


def is_opaque(image: Image) -> bool:
    """Tell whether every pixel is opaque, in an image of any mode."""
    if not image.has_transparency_data:
        return True
    if image.mode[0] == "I":
        return not _transparent_16_bits(image).any()
    least, _ = cast("tuple[int, int]", image.convert("RGBA").getchannel("A").getextrema())
    return least == 255


def on_white(image: Image) -> Image:
    """Draw an image with transparent parts on a white ground, as viewers do, and return it as RGB."""
    from PIL.Image import new

    ground = new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")


def to_rgb(image: Image, name: str) -> Image:
    """Convert to RGB, transparent parts white, and scale channels of more than 8 bits to 8."""
    if image.mode[0] == "I" or image.mode == "F":
        gray = _to_8_bits(image, name)
        if image.mode[0] == "I" and image.has_transparency_data:
            from PIL.Image import fromarray

            gray.paste(255, mask=fromarray(_transparent_16_bits(image)))
        image = gray
    rgb = image.convert("RGB") if is_opaque(image) else on_white(image)
    rgb.info = {}  # if the EXIF stayed, the next reader would turn the image again
    return rgb


def _transparent_16_bits(image: Image) -> Any:
    """Return bool[H, W], true where a 16-bit gray image has the value that its file calls transparent."""
    import numpy as np

    return np.asarray(image) == image.info.get("transparency", -1)


def _to_8_bits(image: Image, name: str) -> Image:
    """Scale 16-bit, 32-bit and float gray values to 8 bits; Pillow would clip them to white.

    A file does not say which value is white. The first range that holds all values of the image decides:

        I;16 (16-bit)   0..65535
        I (32-bit)      0..255, 0..65535, least..greatest
        F (float)       0..1, 0..255, 0..65535, least..greatest

    Raises:
        MediaError: if a value is infinite or not a number.
    """
    whites = {"I": (255, 65_535), "F": (1, 255, 65_535)}.get(image.mode, (65_535,))
    values = (image if image.mode == "F" else image.convert("I")).convert("F")
    if not math.isfinite(sum(array("f", values.tobytes()))):
        raise MediaError(f"{name} holds values that are infinite or not numbers. Save it as 8-bit PNG.")
    low, high = cast("tuple[float, float]", values.getextrema())
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is not None:
        low, high = 0, white
    scale = 255 / ((high - low) or 1)
    return values.point(lambda v: v * scale + (0.5 - low * scale)).convert("L")
