"""JPEG files that are large, or that lack their end marker.

Source: ITU-T T.81, annex B (markers and segments) and annex G (progressive scans).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["close_jpeg", "is_progressive", "scale_jpeg"]

REDUCED_PIXELS = 2**25  # pixels of a large photograph after it was decoded at a smaller size
MOST_PROGRESSIVE = 2  # times as many pixels may a progressive file have: the decoder keeps all its coefficients

_END = b"\xff\xd9"
_FILLERS = (0x00, 0x0F, 0x33, 0x55, 0x6C, 0xAA, 0xC3, 0xF0)  # bytes of coded data; bits at every distance
_SCAN, _INTERVAL, _FRAMES, _RESTARTS = 0xDA, 0xDD, (0xC0, 0xC1, 0xC2), range(0xD0, 0xD8)


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


def close_jpeg(data: bytes, limit: int) -> bytes | None:
    """Give a JPEG file its end marker; None if more than that is missing.

    All scans have to be there. Whether the last one is whole shows in what follows it: a decoder skips bytes behind a
    whole scan, and takes them for the rest of a scan that is cut short. So the picture is the same with any ending if,
    and only if, nothing is missing.

    Args:
        data: the whole file.
        limit: the most pixels that may be decoded; a larger picture is compared at the size at which it is read.
    """
    data = data.rstrip(b"\xff")  # the first half of the end marker
    if not (_has_all_scans(data) and _has_all_restarts(data)):
        return None
    closed = data + _END
    try:
        whole = _decode(closed, limit)
        endings = (bytes([filler]) * 64 for filler in _FILLERS)
        is_whole = all(_decode(data + ending + _END, limit) == whole for ending in endings)
    except Exception:  # as in `decode_image`
        return None
    return closed if is_whole else None


def _decode(data: bytes, limit: int) -> bytes:
    from vlm_cli.media.opening import open_image

    image = open_image(data)
    assert image is not None
    # Pillow makes the whole picture before it reads a row: a header alone can ask for gigabytes.
    if image.width * image.height > limit and not scale_jpeg(image, limit):
        raise ValueError("more pixels than may be decoded")
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


def _has_all_restarts(data: bytes) -> bool:
    """Tell whether each scan has as many restart markers as its picture needs.

    A decoder that misses a restart marker takes any bytes for it, and leaves the rest of the picture gray.
    """
    interval, needed, found = 0, 0, 0
    size, sampling = (0, 0), {}
    for marker, body in _segments(data):
        if marker in _RESTARTS:
            found += 1
        elif marker == _INTERVAL:
            (interval,) = struct.unpack_from(">H", body)
        elif marker in _FRAMES:
            size = struct.unpack_from(">HH", body, 1)
            sampling = {body[6 + 3 * k]: divmod(body[7 + 3 * k], 16) for k in range(body[5])}
        elif marker == _SCAN:
            if found < needed:
                return False
            names = [body[1 + 2 * k] for k in range(body[0])]
            units = _count_units(size, sampling, names)
            needed, found = (math.ceil(units / interval) - 1 if interval else 0), 0
    return found >= needed


def _count_units(size: tuple[int, ...], sampling: Mapping[int, tuple[int, int]], names: Sequence[int]) -> int:
    """Count the units of a scan: of one component its blocks, of several the groups of blocks that belong together."""
    height, width = size
    across, down = (max(x[k] for x in sampling.values()) for k in (0, 1))
    if len(names) > 1:
        return math.ceil(width / (8 * across)) * math.ceil(height / (8 * down))
    one_across, one_down = sampling[names[0]]
    columns, rows = math.ceil(width * one_across / across), math.ceil(height * one_down / down)
    return math.ceil(columns / 8) * math.ceil(rows / 8)


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and body of each segment, up to the end of the data."""
    at = 2
    while (at := data.find(b"\xff", at)) != -1 and at + 2 <= len(data):
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:  # coded data, padding, and markers without a body
            if marker in _RESTARTS:
                yield marker, b""
            at += 1 if marker == 0xFF else 2
            continue
        if at + 4 > len(data):
            return
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + length
