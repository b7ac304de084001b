"""JPEG 2000 files that are large, or that lack tiles.

A file holds its picture at several sizes, each half the one before it: of 5 levels, at 1/2, 1/4, 1/8, 1/16 and 1/32.

Source: ITU-T T.800, annex A (codestream syntax).
"""

from __future__ import annotations

import struct
from typing import Any

from vlm_cli.media.jpeg import REDUCED_PIXELS

__all__ = ["has_all_tiles", "scale_jpeg2000"]

_START, _CODING, _TILE = b"\xff\x4f\xff\x51", 0xFF52, 0xFF90  # SOC and SIZ, COD, SOT
_MAIN_HEADER = 2**18  # bytes in which it is looked for
_MOST = 3  # halvings, as of JPEG files


def scale_jpeg2000(image: Any, limit: int) -> bool:
    """Let Pillow decode a JPEG 2000 file at 1/2, 1/4 or 1/8 of its size; memory then grows with that size.

    Args:
        image: an open file.
        limit: the most pixels that may be decoded.

    Returns:
        Whether the file fits the limit now.
    """
    pixels, wanted = image.width * image.height, min(limit, REDUCED_PIXELS)
    halvings = min(_count_levels(image.fp), _MOST)
    needed = next((k for k in range(1, halvings + 1) if pixels <= wanted * 4**k), halvings)
    if not needed or min(image.size) < 2**needed or pixels > limit * 4**needed:
        return False
    image.reduce = needed
    return True


def _count_levels(file: Any) -> int:
    """Read how often a picture is halved in its file; 0 if the header does not say."""
    at = file.tell()
    try:
        file.seek(0)
        header = file.read(_MAIN_HEADER)
    finally:
        file.seek(at)
    at = header.find(_START) + 2
    if at < 2:
        return 0
    while at + 4 <= len(header):
        marker, length = struct.unpack_from(">HH", header, at)
        if marker == _CODING and at + 10 <= len(header):
            return int(header[at + 9])
        if marker == _TILE:
            break
        at += 2 + length
    return 0


def has_all_tiles(jpeg2000: bytes) -> bool:
    """Tell whether the end of the codestream follows the last tile; Pillow leaves missing tiles gray.

    Table A.1: SOT is FF90, EOC is FFD9; coded data holds neither.
    """
    return jpeg2000.rfind(b"\xff\xd9") > jpeg2000.rfind(b"\xff\x90")
