"""Transparent parts, further frames, large photographs, and files that Pillow does not take although they are whole."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vlm_cli.errors import MediaError
from vlm_cli.media import MediaLoader, decode, jpeg, jpeg2000
from vlm_cli.media.decode import decode_image, measure_image

PICTURE = Image.frombytes("RGB", (40, 32), random.Random(0).randbytes(40 * 32 * 3))
SMOOTH = PICTURE.resize((400, 320), Image.Resampling.BICUBIC)


def encode(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def refusal(data, **options):
    with pytest.raises(MediaError) as caught:
        decode_image(data, "'a'", **options)
    return str(caught.value)


# -- transparent parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1", "I;16"])
def test_what_is_hidden_under_full_transparency_is_not_seen(mode):
    """The same picture with three colours under its transparent half; a viewer shows white there."""
    found = []
    for hidden in (0, 255) if mode == "1" else (0, 120, 255):
        image, options = Image.new("L", (8, 8), hidden), {}
        image.paste(40 if mode not in ("1", "I;16") else 0 if hidden else 255, (0, 0, 8, 4))
        if mode in ("RGBA", "LA"):
            image = image.convert(mode)
            alpha = Image.new("L", (8, 8), 255)
            alpha.paste(0, (0, 4, 8, 8))
            image.putalpha(alpha)
        else:
            image = image.convert({"P": "L", "I;16": "I;16"}.get(mode, mode))
            image = image.convert("P") if mode == "P" else image
            value = image.getpixel((0, 7))
            options = {"transparency": value}
        decoded = decode_image(encode(image, **options), "'a'")
        assert decoded.notes == ("on a white ground",)
        assert decoded.image.crop((0, 4, 8, 8)).getcolors() == [(32, (255, 255, 255))], (mode, hidden)
        found.append(decoded.image.crop((0, 0, 8, 4)).getcolors())
    if mode not in ("1", "I;16"):
        assert found[0] == found[1] == found[2] != [(32, (255, 255, 255))]


def test_an_alpha_channel_without_effect_changes_nothing():
    opaque = PICTURE.copy()
    opaque.putalpha(255)
    found = decode_image(encode(opaque), "'a'")
    assert found.notes == () and found.image.tobytes() == PICTURE.tobytes()


# -- further frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "note"),
    [
        ("GIF", "first frame of an animation"),
        ("PNG", "first frame of an animation"),
        ("WEBP", "first frame of an animation"),
        ("TIFF", "first page of several"),
    ],
)
def test_more_frames_are_noted_and_the_first_is_read(format, note):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    found = decode_image(encode(frames[0], format, save_all=True, append_images=frames[1:], **options), "'a'")
    assert found.notes == (note,) and found.image.getpixel((4, 4)) == (255, 0, 0)
    assert decode_image(encode(frames[0], format, **options), "'a'").notes == ()


# -- large photographs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_a_large_photograph_is_decoded_at_a_smaller_size(monkeypatch, options):
    data = encode(SMOOTH, "JPEG", quality=95, **options)
    monkeypatch.setattr(jpeg, "REDUCED_PIXELS", 40_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_image(data, "'a'", max_pixels=100_000)
    assert (found.width, found.height) == (400, 320) and found.image.size == (200, 160)
    assert found.notes == ("read at 1/2 of its size",)
    by_hand = np.asarray(SMOOTH.reduce(2), float)
    assert abs(np.asarray(found.image, float) - by_hand).mean() < 4
    assert decode_image(data, "'a'").image.size == (400, 320)


@pytest.mark.parametrize("options", [{}, {"tile_size": (128, 128)}, {"irreversible": True}], ids=str)
def test_a_large_jpeg2000_file_is_decoded_at_a_smaller_size(monkeypatch, options):
    data = encode(SMOOTH, "JPEG2000", **options)
    monkeypatch.setattr(jpeg2000, "REDUCED_PIXELS", 10_000)
    found = decode_image(data, "'a'", max_pixels=100_000)
    assert (found.width, found.height) == (400, 320) and found.image.size == (100, 80)
    assert found.notes == ("read at 1/4 of its size",)
    assert measure_image(data, "'a'", max_pixels=100_000) == (400, 320)
    by_hand = np.asarray(SMOOTH, float)[::4, ::4]  # a wavelet keeps the even pixels, smoothed
    assert abs(np.asarray(found.image, float) - by_hand).mean() < 6
    assert abs(np.asarray(found.image, float) - by_hand[::-1]).mean() > 20  # the twin
    assert decode_image(data, "'a'").image.size == (400, 320)
    assert "damaged or cut short" in refusal(data[: len(data) // 2], max_pixels=100_000)


def test_a_jpeg2000_file_without_smaller_sizes_keeps_the_limit():
    data = encode(SMOOTH, "JPEG2000", num_resolutions=1)
    assert "has 400 × 320 = 128,000 pixels" in refusal(data, max_pixels=100_000)
    assert "vlm reads at most 1,000 of" in refusal(encode(SMOOTH, "JPEG2000"), max_pixels=1_000)


def test_other_files_and_progressive_ones_keep_the_limit():
    assert "has 400 × 320 = 128,000 pixels; vlm reads at most 100,000 of one image" in refusal(
        encode(SMOOTH), max_pixels=100_000
    )
    large = encode(SMOOTH, "JPEG", progressive=True)
    assert "vlm reads at most 50,000 of progressive JPEG files" in refusal(large, max_pixels=50_000)
    assert decode_image(encode(SMOOTH, "JPEG"), "'a'", max_pixels=50_000).image.size == (200, 160)
    assert decode_image(encode(SMOOTH), "'a'", max_pixels=128_000).image.size == (400, 320)


# -- whole files that Pillow refuses -----------------------------------------------------------------------------------


def test_long_texts_and_profiles_do_not_damage_a_picture():
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "a drawn scene. " * 140_000, zip=True)
    for data in (encode(PICTURE, pnginfo=info), encode(PICTURE, icc_profile=bytes(range(256)) * 5000)):
        with pytest.raises(ValueError, match="too large"):  # the twin
            Image.open(io.BytesIO(data))
        found = MediaLoader(stdin=io.BytesIO(data)).load("-")
        assert found.image.tobytes() == PICTURE.tobytes()
        assert "damaged or cut short" in refusal(data[: len(data) - 200])


def test_a_kind_that_pillow_does_not_read_is_called_so(monkeypatch):
    values = struct.pack("<12f", *range(12))  # 2 × 2 pixels of three float32
    at = 8 + len(values)
    sizes = struct.pack("<6H", 32, 32, 32, 3, 3, 3)
    entries = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, len(values)), (339, 3, 3, at + 6)]
    tiff = b"II*\0" + struct.pack("<I", at + len(sizes)) + values + sizes + struct.pack("<H", len(entries))
    tiff += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    assert refusal(tiff) == (
        "'a' is a TIFF file of a kind that Pillow does not read: unknown pixel mode. Save it as 8-bit PNG or JPEG."
    )

    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", no_memory)
    assert refusal(encode(PICTURE)) == (
        "there is not enough memory to decode 'a' of 40 × 32 pixels. Scale it down first."
    )


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}], ids=str)
@pytest.mark.parametrize(
    "image", [PICTURE, PICTURE.convert("L"), Image.new("RGB", (40, 32), "gray")], ids=["photo", "grey", "one colour"]
)
def test_a_jpeg_that_lacks_only_its_end_marker_is_whole(image, options):
    data = encode(image, "JPEG", **options)
    whole = decode_image(data, "'a'").image.tobytes()
    assert data[-2:] == b"\xff\xd9"
    for end in (1, 2):
        assert decode_image(data[:-end], "'a'").image.tobytes() == whole
    for end in (4, 5, 8, 20):
        if image.getextrema() == ((128, 128),) * 3:  # where rows have no bits of their own, they are never missing
            continue
        assert "cut short" in refusal(data[:-end])


def test_a_jpeg_without_its_last_scans_is_not_whole():
    data = encode(PICTURE, "JPEG", progressive=True)
    scans = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 4
    for scan in scans[1:]:
        assert "cut short" in refusal(data[:scan])
        assert decode_image(data[:scan] + b"\xff\xd9", "'a'")  # the twin: Pillow takes it


def test_the_check_of_headers_has_the_same_limits(tmp_path):
    header = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [(b"IHDR", struct.pack(">IIBBBBB", 10_000, 9_000, 8, 2, 0, 0, 0)), (b"IEND", b"")]
    )
    assert not decode.check_header(header) and decode.check_header(header, max_pixels=90_000_000)
    for data, is_image in ((encode(PICTURE), True), (encode(SMOOTH, "JPEG"), True), (b"text", False)):
        (tmp_path / "a").write_bytes(data)
        with (tmp_path / "a").open("rb") as file:
            assert decode.check_header(file) == is_image


# -- names that look the same ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_disk", "given"),
    [
        ("caf\u00e9.png", "cafe\u0301.png"),
        ("cafe\u0301.png", "caf\u00e9.png"),
        ("Screenshot 9.41\u202fAM.png", "Screenshot 9.41 AM.png"),
        ("a\u00a0folder/e\u0301.png", "a folder/\u00e9.png"),
    ],
)
def test_a_name_that_looks_the_same_is_taken_and_told(tmp_path, on_disk, given):
    file = tmp_path / on_disk
    file.parent.mkdir(exist_ok=True)
    PICTURE.save(file)
    for loader in (MediaLoader(tmp_path), MediaLoader(tmp_path, media_root=tmp_path)):
        found = loader.load(given)
        assert found.notes == (f"its file is called {file.name!a}",) and found.image.size == PICTURE.size
        assert loader.load(on_disk).notes == ()


def test_of_two_names_that_look_the_same_none_is_taken(tmp_path):
    for name in ("a\u202fb.png", "a\u00a0b.png"):
        PICTURE.save(tmp_path / name)
    with pytest.raises(MediaError, match=r"cannot find 'a b\.png'"):
        MediaLoader(tmp_path).load("a b.png")
    PICTURE.save(tmp_path / "a b.png")
    assert MediaLoader(tmp_path).load("a b.png").notes == ()


def test_a_name_that_looks_the_same_does_not_lead_out_of_the_root(tmp_path):
    (tmp_path / "in").mkdir()
    PICTURE.save(tmp_path / "secret.png")
    (tmp_path / "in" / "a\u202fb.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(MediaError, match="leads out of the media root"):
        MediaLoader(tmp_path / "in", media_root=tmp_path / "in").load("a b.png")
