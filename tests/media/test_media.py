"""Sources of images, their modes, and everything that is refused, by its words."""

from __future__ import annotations

import base64
import io
import os
import random
import re
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from tests.support.texts import any_text
from vlm_cli import network
from vlm_cli.errors import MediaError
from vlm_cli.media import LoadedImage, MediaLoader, decode, short_name, sources

PICTURE = Image.frombytes("RGB", (5, 3), bytes((31 * i) % 256 for i in range(5 * 3 * 3)))


def encode(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


PNG = encode(PICTURE)


def data_uri(data):
    return "data:;base64," + base64.b64encode(data).decode()


def pixels(image):
    assert type(image) is Image.Image and image.mode == "RGB"
    return image.size, image.tobytes()


def load_image(source, **options):
    return MediaLoader(**options).load(source).image


def refusal(source, **options):
    with pytest.raises(MediaError) as caught:
        load_image(source, **options)
    return str(caught.value)


def noise(side):
    return Image.frombytes("RGB", (side, side), random.Random(0).randbytes(side * side * 3))


def png_header(width, height):
    """A PNG that claims a size and holds almost nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [*chunks, (b"IEND", b"")]
    )


# Where an image comes from


@pytest.mark.parametrize("name", ["cat.png", "a b>c.png", "données 猫.png", "noextension", "~x.png"])
def test_paths(tmp_path, name):
    (tmp_path / name).write_bytes(PNG)
    found = MediaLoader(tmp_path).load(name)
    assert found == LoadedImage(found.image, name, 5, 3)
    absolute = str(tmp_path / name)
    for source in (absolute, "file://" + quote(absolute), "FILE://localhost" + quote(absolute)):
        assert pixels(load_image(source, base_dir=tmp_path / "elsewhere")) == pixels(found.image) == pixels(PICTURE)
    with pytest.raises(MediaError):
        load_image(name, base_dir=tmp_path / "elsewhere")


def test_home_and_working_directory(tmp_path, monkeypatch):
    (tmp_path / "cat.png").write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_image("~/cat.png", base_dir=tmp_path / "elsewhere").size == (5, 3)
    monkeypatch.chdir(tmp_path)
    assert load_image("cat.png").size == (5, 3)


def test_stdin_is_read_once_and_kept():
    pipe = io.BytesIO(PNG)
    loader = MediaLoader(stdin=pipe)
    first, second = loader.load("-"), loader.load("-")
    assert first.source == "-" and pixels(first.image) == pixels(second.image) == pixels(PICTURE)
    assert "standard input is empty" in refusal("-", stdin=pipe) and "only once" in refusal("-", stdin=pipe)


def test_stdin_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PNG)))
    assert pixels(load_image("-")) == pixels(PICTURE)
    monkeypatch.setattr(sys, "stdin", None)
    assert "nothing is piped in" in refusal("-")


def test_stdin_refuses_a_terminal_and_a_closed_pipe():
    terminal, closed = io.BytesIO(PNG), io.BytesIO(PNG)
    terminal.isatty = lambda: True
    closed.close()
    assert "nothing is piped in. Add `< FILE`" in refusal("-", stdin=terminal)
    assert "standard input cannot be read" in refusal("-", stdin=closed)


def test_data_uris():
    coded = base64.b64encode(PNG).decode()
    for uri in (
        "data:image/png;base64," + coded,
        "DATA:;BASE64," + coded,
        "data:image/png;name=a;base64," + quote(coded),
        "data:image/png;base64," + "\n ".join(coded[i : i + 60] for i in range(0, len(coded), 60)),
        "data:," + quote(PNG),
    ):
        assert pixels(load_image(uri)) == pixels(PICTURE)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("data:image/png", ["has no comma", "Write data:image/png;base64,DATA"]),
        ("data:image/png;base64,AAA", ["'data:image/png (2 B)' is not valid base64", "cut short?"]),
        ("data:image/png;base64,A*==", ["not valid base64"]),
        ("data:image/png;base64,\ud800é==", ["not valid base64"]),
        ("data:,", ["'data: (0 B)' is empty (0 bytes)"]),
        ("data:,hello", ["not an image", "b'hello'"]),
    ],
)
def test_data_uri_refusals(uri, words):
    message = refusal(uri)
    assert all(word in message for word in words), message


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        moved = {"/moved": "/cat.png", "/away": "ftp://127.0.0.1/cat.png", "/local": "file:///etc/passwd"}
        if self.path in moved:
            self.send_response(302)
            self.send_header("Location", moved[self.path])
            self.end_headers()
        elif self.path in ("/cat.png", "/a%20%C3%A9.png?x=1"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG)
        elif self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", str(len(PNG)))
            self.end_headers()
            self.wfile.write(PNG[:40])
        elif self.path == "/huge":
            self.send_response(200)
            self.send_header("Content-Length", str(10**12))
            self.end_headers()
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/cat.png", "/moved", "/a é.png?x=1"])
def test_urls_are_fetched_only_when_allowed(server, path):
    assert "is a URL" in refusal(server + path) and "--allow-urls" in refusal(server + path)
    assert pixels(load_image(server + path, allow_urls=True, allow_hosts=("127.0.0.1",))) == pixels(PICTURE)


def test_an_address_is_fetched_once_to_measure_and_to_load_it(server, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(Handler, "log_message", lambda self, *args: asked.append(self.path))
    loader = MediaLoader(allow_urls=True, allow_hosts=("127.0.0.1",))
    address = server + "/cat.png"
    assert loader.measure(address) == PICTURE.size and pixels(loader.load(address).image) == pixels(PICTURE)
    assert len(asked) == 1
    loader.load(address)
    assert len(asked) == 2  # what was loaded is not kept
    monkeypatch.setattr("vlm_cli.media.loader._MOST_KEPT", len(PNG) - 1)
    other = server + "/a%20%C3%A9.png?x=1"
    loader.measure(other)
    loader.load(other)
    assert len(asked) == 4  # too large to be kept


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nothing", "the server answered 404 Not Found. Check the address"),
        ("/away", "begins with ftp:, and vlm fetches http and https"),
        ("/local", "cannot be fetched"),
        ("/huge", "larger than the 268.4 MB"),
        ("/short", "cut short"),
    ],
)
def test_url_refusals(server, path, words):
    assert words in refusal(server + path, allow_urls=True, allow_hosts=("127.0.0.1",))


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:1/a.png", "http://a:b/c", "https://[/", "http://a\0b/"])
def test_addresses_that_cannot_be_fetched(url, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    assert "cannot be fetched" in refusal(url, allow_urls=True, allow_hosts=("127.0.0.1",))


def test_urls_end_in_time_and_size(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(network, "WAIT", -1.0)
        assert "takes longer than" in refusal(server + "/cat.png", allow_urls=True, allow_hosts=("127.0.0.1",))
    monkeypatch.setattr(sources, "MAX_BYTES", len(PNG) - 1)
    assert "is larger than" in refusal(server + "/cat.png", allow_urls=True, allow_hosts=("127.0.0.1",))


def test_other_schemes_are_named():
    assert "begins with s3://, which is not known. Known: a path" in refusal("s3://bucket/cat.png")
    assert "points to the host 'server'" in refusal("file://server/cat.png")


# What is refused before it is read


def test_missing_files_say_what_is_there(tmp_path):
    for name in ("cat.png", "dog.png", ".hidden"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.png").symlink_to("gone.png")
    where = repr(str(tmp_path))
    assert refusal("Catt.png", base_dir=tmp_path) == (
        f"cannot find 'Catt.png': there is no 'Catt.png' in {where}. Did you mean 'cat.png'?"
    )
    assert refusal("zzzz", base_dir=tmp_path).endswith("It holds 'cat.png', 'dog.png', 'empty', 'link.png'.")
    for i in range(8):
        (tmp_path / f"b{i}").touch()
    assert refusal("zzzz", base_dir=tmp_path).endswith("It holds 'b0', 'b1', 'b2', 'b3', 'b4' and 7 more.")
    assert "It is empty." in refusal("empty/cat.png", base_dir=tmp_path)
    assert f"there is no 'emptyy' in {where}. Did you mean 'empty'?" in refusal("emptyy/a/b.png", base_dir=tmp_path)
    assert "cat.png' is a file, not a folder" in refusal("cat.png/a.png", base_dir=tmp_path)
    assert "is a link to 'gone.png', which does not exist" in refusal("link.png", base_dir=tmp_path)


def test_what_is_not_a_file(tmp_path):
    (tmp_path / "cat.png").write_bytes(PNG)
    assert "is a directory. Give one of its files. It holds 'cat.png'." in refusal(str(tmp_path))
    assert "an image source is empty: got ''" in refusal("")
    assert "'.' is a directory" in refusal(".", base_dir=tmp_path)
    (tmp_path / "none.png").touch()
    assert "'none.png' is empty (0 bytes); an image was expected." in refusal("none.png", base_dir=tmp_path)


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in (str(tmp_path / "pipe"), "/dev/zero", "/dev/null", "file:///dev/zero"):
        assert "is a pipe or device, not a file. A pipe is read by `--image - <" in refusal(source)


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 300 + ".png", "file:///a%00b", "\ud800" * 200])
def test_what_cannot_be_a_name(tmp_path, name):
    message = refusal(name, base_dir=tmp_path)
    assert "cannot be a file name here" in message and "data:image/png;base64,DATA" in message
    assert len(message) < 700


def test_unreadable_files(tmp_path, monkeypatch):
    path = tmp_path / "cat.png"
    path.write_bytes(PNG)
    assert load_image(str(path)).size == (5, 3)

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", forbidden)  # root, who runs some tests, may read any file
    assert "may not be read by this user. Change that with `chmod +r`" in refusal(str(path))

    def broken(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(path), "open", broken)
    assert "cannot be read: Input/output error." in refusal(str(path))


def test_large_files(tmp_path, monkeypatch):
    with (tmp_path / "large.png").open("wb") as file:
        file.write(PNG)
        file.truncate(sources.MAX_BYTES + 1)  # sparse: no bytes on the disk
    assert "'large.png' is larger than the 268.4 MB that vlm reads" in refusal("large.png", base_dir=tmp_path)
    monkeypatch.setattr(sources, "MAX_BYTES", len(PNG))
    assert load_image("-", stdin=io.BytesIO(PNG)).size == (5, 3)
    assert "standard input is larger than" in refusal("-", stdin=io.BytesIO(PNG + b"\0"))
    assert "larger than" in refusal(data_uri(PNG + b"\0"))


def test_decompression_bombs(monkeypatch):
    assert decode.MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    before = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own warning would reach the user raw
        message = refusal(data_uri(png_header(10_000, 9_000)))
    assert "has 10000 × 9000 = 90,000,000 pixels; vlm reads at most 89,478,485" in message
    assert message.endswith("or allow as many with --max-pixels 90000000.")
    assert "has too many pixels" in refusal(data_uri(png_header(100_000, 100_000)))
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == before
    assert "damaged or cut short" in refusal(data_uri(png_header(10_000, 9_000)), max_pixels=90_000_000)
    assert "damaged or cut short" in refusal(data_uri(png_header(10, 9)))
    monkeypatch.setattr(decode, "MAX_PIXELS", 14)
    assert "has 5 × 3 = 15 pixels" in refusal(data_uri(PNG))


# What is not a whole image


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello, world!", "begins with b'hello, world' (text). Give a PNG"),
        (b"%PDF-1.7\n", "(a PDF)"),
        (b"\n<svg xmlns=", "(SVG or XML)"),
        (b"<!DOCTYPE html>", "(a web page)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull` fetches the image"),
        (b"\0\0\0\x18ftypheic", "(HEIC)"),
        (b"\0\0\0\x18ftypmp42", "(a video; show it with <video:FILE>)"),
        (b"PK\3\4", "(an archive)"),
        (b"GIF89a", "(an image, damaged or cut short)"),
        (b"\xff\xd8\xff", "(an image, damaged or cut short)"),
    ],
)
def test_what_is_not_an_image(data, words):
    message = refusal("-", stdin=io.BytesIO(data))
    assert message.startswith("standard input is not an image") and words in message


def test_postscript_is_not_run():
    assert "PostScript program, and vlm runs none" in refusal(data_uri(encode(PICTURE, "EPS")))


FORMATS = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"restart_marker_rows": 1}),
    ("GIF", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("PPM", {}),
    ("JPEG2000", {"tile_size": (16, 16)}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_a_file_cut_short_is_whole_or_refused(format, options):
    data = encode(noise(32), format, **options)
    whole = pixels(load_image(data_uri(data)))
    for end in [*range(1, len(data), 1 + len(data) // 60), *(len(data) - n for n in range(1, 20))]:
        try:
            assert pixels(load_image(data_uri(data[:end]))) == whole
        except MediaError as error:
            assert "cut short" in str(error) or "not an image" in str(error)
    refusal(data_uri(data[: len(data) // 2]))


def test_jpeg2000_without_its_last_tiles():
    data = encode(noise(64), "JPEG2000", tile_size=(16, 16))
    cuts = [data[: found.end()] for found in re.finditer(b"\xff\x90", data)]
    assert len(cuts) == 16
    for cut in cuts:
        assert "its last tiles are missing" in refusal(data_uri(cut))
        assert Image.open(io.BytesIO(cut)).convert("RGB")  # the twin: Pillow takes it


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"restart_marker_blocks": 3}, {"restart_marker_rows": 1, "progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_file_without_some_of_its_restart_intervals(mode, options):
    """A decoder that finds no restart marker takes any bytes for it, and leaves the rest gray."""
    data = encode(noise(40).convert(mode), "JPEG", **options)
    whole = pixels(load_image(data_uri(data)))
    assert pixels(load_image(data_uri(data[:-2]))) == whole  # only the end marker is missing
    last = max(data.rfind(bytes([0xFF, marker])) for marker in range(0xD0, 0xD8))
    for end in (last, last + 2):
        assert "cut short" in refusal(data_uri(data[:end]))


def test_a_large_picture_without_its_end_is_compared_at_the_size_at_which_it_is_read(monkeypatch):
    """A header alone could ask for gigabytes otherwise."""
    sizes: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: sizes.append(self.size) or load(self))
    data = encode(Image.effect_noise((640, 480), 50).convert("RGB"), "JPEG")
    whole, closed = (load_image(data_uri(x), max_pixels=100_000) for x in (data, data[:-2]))
    assert pixels(whole) == pixels(closed) and whole.size == (320, 240)
    assert len(sizes) > 2 and set(sizes) == {(320, 240)}
    sizes.clear()
    load_image(data_uri(data[:-2]))
    assert set(sizes) == {(640, 480)}  # the twin: within the limit, at full size


def test_cut_files_would_be_half_gray(monkeypatch):
    """The twin of the tests above: what Pillow makes of half a file when told not to mind."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encode(noise(32), "BMP")
    half = Image.open(io.BytesIO(data[: len(data) // 2])).convert("RGB")
    assert pixels(half) != pixels(load_image(data_uri(data)))


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=150)
@given(st.sampled_from(FORMATS[:4]), st.data())
def test_damaged_files_give_an_image_or_a_media_error(format, draw):
    data = bytearray(encode(PICTURE, format[0], **format[1]))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        assert load_image(data_uri(bytes(data))).mode == "RGB"
    except MediaError as error:
        assert str(error).startswith("'data: (")


# What comes back


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PICTURE, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    found = MediaLoader().load(data_uri(data))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert pixels(found.image) == pixels(expected) == pixels(ImageOps.exif_transpose(found.image))
    assert (
        (found.width, found.height) == ((5, 3) if orientation < 5 else (3, 5)) == MediaLoader().measure(data_uri(data))
    )
    assert (found.image.tobytes() == PICTURE.tobytes()) == (orientation == 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_counts_as_upright(exif):
    assert load_image(data_uri(encode(PICTURE, "JPEG", exif=exif))).size == (5, 3)


def test_transparent_palettes_convert_without_a_warning():
    image = PICTURE.quantize(8)
    data = encode(image, transparency=bytes(range(0, 256, 32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_image(data_uri(data))
    rgba = Image.open(io.BytesIO(data)).convert("RGBA").tobytes()
    for at, value in enumerate(found.tobytes()):  # c·a + 255·(1 - a), by hand
        colour, alpha = rgba[at // 3 * 4 + at % 3], rgba[at // 3 * 4 + 3]
        assert abs(value - (colour * alpha + 255 * (255 - alpha)) / 255) <= 1


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("CMYK", "TIFF"),
        ("CMYK", "JPEG"),
        ("LAB", "TIFF"),
    ],
)
def test_modes_convert_as_in_pillow(mode, format):
    image = PICTURE.convert("RGBA" if mode == "LA" else "RGB")
    data = encode(image.convert(mode), format)
    opened = Image.open(io.BytesIO(data))
    assert opened.mode == mode
    assert pixels(load_image(data_uri(data))) == pixels(opened.convert("RGB"))


@pytest.mark.parametrize(
    ("mode", "format", "values", "expected"),
    [
        ("I;16", "PNG", [0, 257, 32768, 65535], [0, 1, 128, 255]),
        ("I;16", "TIFF", [0, 200, 65535], [0, 1, 255]),
        ("I", "PPM", [0, 257, 65535], [0, 1, 255]),
        ("I", "TIFF", [0, 100, 255], [0, 100, 255]),
        ("I", "TIFF", [0, 257, 65535], [0, 1, 255]),
        ("I", "TIFF", [-1000, 0, 1000], [0, 128, 255]),
        ("I", "TIFF", [10**6, 2 * 10**6], [0, 255]),
        ("F", "TIFF", [0.0, 0.5, 1.0], [0, 128, 255]),
        ("F", "TIFF", [0.0, 99.6, 255.0], [0, 100, 255]),
        ("F", "TIFF", [0.0, 257.0, 65535.0], [0, 1, 255]),
        ("F", "TIFF", [-2.0, 0.0, 2.0], [0, 128, 255]),
        ("F", "TIFF", [1e30, 1e30], [0, 0]),
    ],
)
def test_more_than_8_bits_are_scaled(mode, format, values, expected):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    data = encode(image, format)
    assert Image.open(io.BytesIO(data)).mode == mode
    assert list(load_image(data_uri(data)).tobytes()) == [v for v in expected for _ in "RGB"]


def test_16_bits_would_be_white():
    """The twin: Pillow's own conversion of a 32-bit gray clips it."""
    assert Image.new("I", (1, 1), 32768).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_floats_that_are_not_finite(value):
    image = Image.new("F", (2, 2), 0.5)
    image.putpixel((1, 1), value)
    assert "infinite or not numbers" in refusal(data_uri(encode(image, "TIFF")))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_several(format):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    red, green, _ = load_image(data_uri(data)).getpixel((2, 2))
    assert red > 250 and green < 5


# Names


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("-", "stdin"),
        ("dir/cat.png", "dir/cat.png"),
        ("données/猫.png", "données/猫.png"),
        ("a\nb\x1b[31m.png", r"a\nb\x1b[31m.png"),
        ("data:image/png;base64," + "A" * 1600, "data:image/png (1.2 kB)"),
        ("data:image/png;base64," + "A" * 4_000_000, "data:image/png (3.0 MB)"),
        ("data:;base64,QQ==", "data: (1 B)"),
        ("data:text/plain,a%20b", "data:text/plain (3 B)"),
        ("x" * 50 + "y" * 50, "x" * 40 + "…" + "y" * 39),
    ],
)
def test_short_name(source, name):
    assert short_name(source) == name


@given(any_text)
def test_short_name_is_one_short_line(source):
    assert all(c.isprintable() for c in short_name(source)) and len(short_name(source)) <= 10 * 100


def test_import_is_light():
    code = "import sys, vlm_cli.media; print({'torch', 'PIL', 'numpy', 'http.client'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
