"""JPEG files that are large, or that lack their end marker.

Source: ITU-T T.81, annex B (markers and segments) and annex G (progressive scans).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["close_jpeg", "is_progressive", "scale_jpeg"]

REDUCED_PIXELS = 2**25  # pixels of a large photograph after it was decoded at a smaller size
MOST_PROGRESSIVE = 2  # times as many pixels may a progressive file have: the decoder keeps all its coefficients

_END = b"\xff\xd9"
_FILLERS = (0x00, 0x0F, 0x33, 0x55, 0x6C, 0xAA, 0xC3, 0xF0)  # bytes of coded data; bits at every distance
_SCAN, _FRAMES = 0xDA, (0xC0, 0xC1, 0xC2)


def scale_jpeg(image: Any, limit: int) -> bool:
    """Let Pillow decode a JPEG file at 1/2, 1/4 or 1/8 of its size; memory then grows with that size only.

    Args:
        image: an open file.
        limit: the most pixels that may be decoded.

    Returns:
        Whether the file fits the limit now. A progressive file takes the memory of its full size.
    """
    width, height = image.size
    if is_progressive(image) and width * height > MOST_PROGRESSIVE * limit:
        return False
    wanted = min(limit, REDUCED_PIXELS)
    scale = next((scale for scale in (2, 4) if width * height <= wanted * scale**2), 8)
    if min(width, height) < scale:
        return False
    image.draft(None, (width // scale, height // scale))
    return bool(image.width * image.height <= limit)


def is_progressive(image: Image) -> bool:
    """Tell whether an open file is a JPEG file in several passes over the whole picture."""
    return bool(image.info.get("progressive"))


def close_jpeg(data: bytes) -> bytes | None:
    """Give a JPEG file its end marker; None if more than that is missing.

    All scans have to be there. Whether the last one is whole shows in what follows it: a decoder skips bytes behind a
    whole scan, and takes them for the rest of a scan that is cut short. So the picture is the same with any ending if,
    and only if, nothing is missing.
    """
    data = data.rstrip(b"\xff")  # the first half of the end marker
    if not _has_all_scans(data):
        return None
    closed = data + _END
    try:
        whole = _decode(closed)
        endings = (bytes([filler]) * 64 for filler in _FILLERS)
        is_whole = all(_decode(data + ending + _END) == whole for ending in endings)
    except Exception:  # as in `decode_image`
        return None
    return closed if is_whole else None


def _decode(data: bytes) -> bytes:
    from vlm_cli.media.opening import open_image

    image = open_image(data)
    assert image is not None
    return image.tobytes()


def _has_all_scans(data: bytes) -> bool:
    """Tell whether the scans bring every coefficient of every component to its last bit."""
    components: set[int] = set()
    whole: dict[int, set[int]] = {}  # component -> its coefficients that are complete
    try:
        for marker, body in _segments(data):
            if marker in _FRAMES:
                components = {body[6 + 3 * k] for k in range(body[5])}
            elif marker == _SCAN:
                count = body[0]
                first, last, bits = body[1 + 2 * count : 4 + 2 * count]
                for k in range(count):
                    coefficients = range(first, last + 1) if bits & 15 == 0 else ()
                    whole.setdefault(body[1 + 2 * k], set()).update(coefficients)
    except (IndexError, ValueError, struct.error):
        return False
    return bool(components) and all(len(whole.get(name, ())) == 64 for name in components)


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and body of each segment, up to the end of the data."""
    at = 2
    while (at := data.find(b"\xff", at)) != -1 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:  # coded data, padding, and markers without a body
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + length
