"""Decode the bytes of an image to upright 8-bit RGB, whole or not at all.

A file that is cut short is an error, never a picture whose lower half is gray. Pillow is imported on first use.
"""

from __future__ import annotations

import io
import math
import re
from array import array
from typing import TYPE_CHECKING, cast

from vlm_cli.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MAX_PIXELS", "decode_image"]

MAX_PIXELS = 89_478_485  # pixels of one image; Pillow warns of a decompression bomb from here on


def decode_image(data: bytes, name: str) -> Image:
    """Decode the first frame of an image file to upright RGB.

    Args:
        data: the whole file.
        name: what messages call it.

    Raises:
        MediaError: if `data` is no image, is damaged, or has too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        _check_pixels(*image.size, name)
        if image.format == "EPS":  # Pillow would run Ghostscript to decode it
            raise MediaError(f"{name} is a PostScript program, and vlm runs none. Convert it to PNG.")
        if image.format == "JPEG2000" and not _has_all_tiles(data):
            raise EOFError("its last tiles are missing")
        image.load()
        return _to_rgb(_turn_upright(image), name)
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise _non_image_error(data, name) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        words = f"{name} has too many pixels."
        raise MediaError(f"{words} {error} Scale it down first.", public=f"{words} Scale it down first.") from None
    except Exception as error:  # for a damaged file, Pillow's plugins raise errors of any type
        words, advice = f"{name} is damaged or cut short", "Fetch or save it again."
        raise MediaError(
            f"{words}: {str(error) or type(error).__name__}. {advice}", public=f"{words}. {advice}"
        ) from error


def _check_pixels(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} has {width} × {height} = {width * height:,} pixels; vlm reads at most {MAX_PIXELS:,}, "
            "because a larger image may be a decompression bomb. Scale it down first."
        )
    if width < 1 or height < 1:
        raise MediaError(f"{name} has no pixels: it is {width} × {height}. Save it again.")


def _has_all_tiles(jpeg2000: bytes) -> bool:
    """Tell whether the end of the codestream follows the last tile; Pillow leaves missing tiles gray.

    Source: ITU-T T.800, table A.1 (SOT is FF90, EOC is FFD9; coded data holds neither).
    """
    return jpeg2000.rfind(b"\xff\xd9") > jpeg2000.rfind(b"\xff\x90")


def _turn_upright(image: Image) -> Image:
    """Apply the EXIF orientation. An image whose EXIF cannot be read counts as upright, as in other viewers."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # as in `decode_image`
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _to_rgb(image: Image, name: str) -> Image:
    """Convert to RGB as Pillow does (it drops alpha), but scale channels of more than 8 bits to 8."""
    if image.mode[0] == "I" or image.mode == "F":
        image = _to_8_bits(image, name)
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # converting to RGB directly gives the same pixels, with a warning
    rgb = image.convert("RGB")
    rgb.info = {}  # if the EXIF stayed, the next reader would turn the image again
    return rgb


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


#: (pattern of the first bytes, what such a file is): files that people take for images, and damaged images.
_KINDS = (
    (b"\x89PNG|\xff\xd8\xff|GIF8|BM|II\\*\0|MM\0\\*|RIFF....WEBP", "an image, damaged or cut short"),
    (b"%PDF", "a PDF"),
    (b"\\s*<svg|\\s*<\\?xml", "SVG or XML"),
    (b"(?i)\\s*<!doctype html|\\s*<html", "a web page"),
    (b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` fetches the image"),
    (b"....ftyp(heic|heix|mif1|hevc)", "HEIC"),
    (b"....ftyp|\x1aE\xdf\xa3", "a video"),
    (b"PK\3\4|\x1f\x8b", "an archive"),
    (b"[\t\n\r -~]{32}|[\t\n\r -~]{1,31}\\Z", "text"),
)


def _non_image_error(data: bytes, name: str) -> MediaError:
    """Say that a file is no image, and what its first bytes suggest that it is. Only the user sees these bytes."""
    kind = next((f" ({kind})" for start, kind in _KINDS if re.match(start, data, re.DOTALL)), "")
    words, advice = f"{name} is not an image that Pillow can read", "Give a PNG, JPEG, WebP or the like."
    return MediaError(f"{words}: it begins with {data[:12]!r}{kind}. {advice}", public=f"{words}{kind}. {advice}")
