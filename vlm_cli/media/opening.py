"""Open an image file with Pillow, and say in words why that is not possible.

Pillow raises errors of any type and for many reasons. Only some of them mean that a file is damaged: others mean that
Pillow does not read files of this kind, or that there is not enough memory.
"""

from __future__ import annotations

import io
import re
import struct
from typing import TYPE_CHECKING, Any, cast

from vlm_cli.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["non_image_error", "open_image", "unread_error"]

#: What the errors of Pillow's plugins say of a whole file of a kind that they do not read.
_UNREADABLE = re.compile(
    r"unsupported|not supported|unknown (pixel|mode|compression|photometric|colou?r)|unrecogni[sz]ed"
    r"|not available|cannot find loader|cannot (handle|read this)|unknown (raw )?(mode|decoder)",
    re.IGNORECASE,
)
#: Chunks of a PNG file with texts and a colour profile, which change no pixel that vlm reads.
_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def open_image(file: bytes | io.BufferedIOBase) -> Image | None:
    """Read the header of an image file; None if no plugin of Pillow takes the file.

    `PIL.Image.open` would warn about, or refuse, what has more pixels than Pillow likes; vlm has a limit of its own.

    Raises:
        UnreadableKind: if a plugin knows the format, and not this kind of it.
        Exception: whatever a plugin raises for a damaged file.
    """
    from PIL import Image as PIL

    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    prefix = stream.read(16)
    tried, reason = set[str](), ""
    for prepare in (PIL.preinit, PIL.init):  # the common formats, then all of them
        prepare()
        for format in [format for format in PIL.ID if format not in tried]:
            tried.add(format)
            factory, accepts = PIL.OPEN[format]
            try:
                accepted = accepts is None or accepts(prefix)
                if isinstance(accepted, str) or not accepted:  # a text says what is not installed
                    continue
                stream.seek(0)
                return _open_as(factory, format, stream)
            except (SyntaxError, IndexError, TypeError, struct.error) as error:  # what `PIL.Image.open` catches
                if accepts is not None and _UNREADABLE.search(str(error)):
                    reason = f"a {format} file of a kind that Pillow does not read: {error}"
    if reason:
        raise UnreadableKind(reason)
    return None


class UnreadableKind(Exception):
    """A whole file of a format that Pillow knows, of a kind that it does not read."""


def _open_as(factory: Any, format: str, stream: io.BufferedIOBase) -> Image:
    """Open a file with one plugin. Texts or a profile that are too long for Pillow do not keep it from a picture."""
    try:
        return cast("Image", factory(stream, ""))
    except ValueError as error:
        if format != "PNG" or "too large" not in str(error):
            raise
    stream.seek(0)
    return cast("Image", factory(io.BytesIO(_without_notes(stream.read())), ""))


def _without_notes(png: bytes) -> bytes:
    """Return a PNG file without its texts and its colour profile.

    Source: https://www.w3.org/TR/png-3/#5Chunk-layout (length, type, data, check sum).
    """
    kept, at = bytearray(png[:8]), 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] not in _NOTES:
            kept += png[at:end]
        at = end
    return bytes(kept)


def unread_error(error: Exception, image: Image | None, name: str) -> MediaError:
    """Say why a file that looks like an image cannot be decoded.

    Args:
        error: what Pillow raised.
        image: what Pillow made of the header; None if it made nothing.
        name: what the message calls the file.
    """
    reason = str(error) or type(error).__name__
    if isinstance(error, UnreadableKind):
        words, advice, shown = f"{name} is {error}", "Save it as 8-bit PNG or JPEG.", ""
    elif isinstance(error, MemoryError):
        size = "" if image is None else f" of {image.width} × {image.height} pixels"
        words, advice, shown = f"there is not enough memory to decode {name}{size}", "Scale it down first.", ""
    elif isinstance(error, NotImplementedError) or _UNREADABLE.search(reason):
        format = "an image" if image is None else f"a {image.format} file"
        words, advice = f"{name} is {format} of a kind that Pillow does not read", "Save it as 8-bit PNG or JPEG."
        shown = f": {reason}"
    else:
        words, advice, shown = f"{name} is damaged or cut short", "Fetch or save it again.", f": {reason}"
    return MediaError(f"{words}{shown}. {advice}", public=f"{words}. {advice}")


#: (pattern of the first bytes, what such a file is): files that people take for images, and damaged images.
_KINDS = (
    (b"\x89PNG|\xff\xd8\xff|GIF8|BM|II\\*\0|MM\0\\*|RIFF....WEBP", "an image, damaged or cut short"),
    (b"%PDF", "a PDF"),
    (b"\\s*<svg|\\s*<\\?xml", "SVG or XML"),
    (b"(?i)\\s*<!doctype html|\\s*<html", "a web page"),
    (b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` fetches the image"),
    (b"....ftyp(heic|heix|mif1|hevc)", "HEIC"),
    (b"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video; show it with <video:FILE>"),
    (b"PK\3\4|\x1f\x8b", "an archive"),
    (b"[\t\n\r -~]{32}|[\t\n\r -~]{1,31}\\Z", "text"),
)


def non_image_error(data: bytes, name: str) -> MediaError:
    """Say that a file is no image, and what its first bytes suggest that it is. Only the user sees these bytes."""
    kind = next((f" ({kind})" for start, kind in _KINDS if re.match(start, data, re.DOTALL)), "")
    words, advice = f"{name} is not an image that Pillow can read", "Give a PNG, JPEG, WebP or the like."
    return MediaError(f"{words}: it begins with {data[:12]!r}{kind}. {advice}", public=f"{words}{kind}. {advice}")
