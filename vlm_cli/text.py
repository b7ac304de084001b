"""Read text that a user brings, in one way wherever it stands: prompts, files of prompts, chats, lines of JSONL.

Text is UTF-8. A byte order mark at its start is no part of it, and each line ends with a line feed.
"""

from __future__ import annotations

import codecs
import re

__all__ = ["PICTURE_HEAD", "clean_text", "decode_text", "picture_format"]

#: Byte order marks of other encodings; that of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_PICTURES = {
    "PNG": rb"\x89PNG\r\n",
    "JPEG": rb"\xff\xd8\xff",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II\*\0|MM\0\*",
    "WebP": rb"RIFF.{4}WEBP",
    "AVIF or HEIC": rb".{4}ftyp(avi|hei|mif|hev|msf)",
    "JPEG XL": rb"\0\0\0\x0cJXL ",
    "BMP": rb"BM.{4}\0{4}",
}
PICTURE_HEAD = 16  # bytes that `picture_format` needs


def decode_text(raw: bytes) -> str:
    r"""Turn bytes into text.

    >>> decode_text(b"\xef\xbb\xbfone\r\ntwo")
    'one\ntwo'

    Raises:
        ValueError: if the bytes are no UTF-8 text; the message says what they are ("not UTF-8 text: byte 3 is …").
    """
    if other := next((name for mark, name in _MARKS.items() if raw.startswith(mark)), None):
        raise ValueError(_convert(other))
    if picture := picture_format(raw):
        raise ValueError(f"a picture ({picture}), not text. Pictures belong in --image FILE or <image:FILE>")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 text: byte {error.start + 1:,} is {raw[error.start]:#04x}. Save it as UTF-8"
        ) from None
    head = raw[:32]
    if len(head) >= 4 and not all(any(head[i::2]) for i in (0, 1)):  # letters of ASCII, each with a byte of zero
        raise ValueError(_convert("UTF-16"))
    return clean_text(text)


def clean_text(text: str) -> str:
    """Remove a byte order mark, and end each line with a line feed."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _convert(encoding: str) -> str:
    return f"not UTF-8 text but {encoding}. Save it as UTF-8, or convert it: iconv -f {encoding} -t UTF-8 FILE"


def picture_format(head: bytes) -> str | None:
    r"""Name the format of a picture by its first bytes; None if they begin no picture.

    >>> picture_format(b"\x89PNG\r\n\x1a\n")
    'PNG'
    """
    return next((name for name, start in _PICTURES.items() if re.match(start, head, re.DOTALL)), None)
