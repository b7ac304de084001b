"""Text that a user brings is read in one way, and what is no text is named."""

from __future__ import annotations

import codecs
import io
from pathlib import Path

import pytest
from PIL import Image

from vlm_cli.plain_data import read_json, read_text
from vlm_cli.text import PICTURE_HEAD, decode_text, picture_format


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", ""),
        (b"one\ntwo\n", "one\ntwo\n"),
        (b"one\r\ntwo\r\n", "one\ntwo\n"),
        (b"one\rtwo", "one\ntwo"),
        (codecs.BOM_UTF8 + "naïve 😀".encode(), "naïve 😀"),
        (codecs.BOM_UTF8, ""),
        (b"a\0b", "a\0b"),
        ("a\ufeffb".encode(), "a\ufeffb"),
        (b"BM is a bookmark, and II* is none", "BM is a bookmark, and II* is none"),
    ],
)
def test_one_text_for_every_way_to_save_it(raw: bytes, text: str) -> None:
    assert decode_text(raw) == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding: str) -> None:
    name = encoding[:6].upper()
    with pytest.raises(ValueError, match=f"not UTF-8 text but {name}. Save it .* iconv -f {name} -t UTF-8 FILE"):
        decode_text("Describe it.".encode(encoding))


def test_a_byte_that_is_no_text_is_named() -> None:
    with pytest.raises(ValueError, match="not UTF-8 text: byte 3 is 0xff"):
        decode_text(b"ab\xff")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_pictures_are_named(kind: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, kind)
    found = picture_format(data.getvalue()[:PICTURE_HEAD])
    assert found is not None and found.upper() == kind
    with pytest.raises(ValueError, match=r"a picture .* not text"):
        decode_text(data.getvalue())


def test_configurations_are_read_in_the_same_way(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(codecs.BOM_UTF8 + b'{"a":\r\n1}')
    assert read_json(file) == {"a": 1}
    file.write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(ValueError, match="it is not UTF-8 text but UTF-16"):
        read_text(file)
