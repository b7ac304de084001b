"""Images from wherever they are kept, as upright RGB; or a message that says why not.

A source is a path (also `~/…` and `file://…`), `-` for standard input, a `data:` URI or, where allowed,
an `http(s)://` URL. Nothing comes back half read: a file cut short is an error, and what could hang or
fill the memory is refused before it is read. Pillow is imported on first use.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import errno
import io
import math
import os
import re
import stat
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from vlm_cli.errors import MediaError

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from PIL.Image import Image

__all__ = ["MAX_BYTES", "MAX_PIXELS", "LoadedImage", "MediaLoader", "load_image", "short_name"]

MAX_BYTES = 256 * 2**20  # bytes of one encoded image
MAX_PIXELS = 89_478_485  # pixels of one image; from here on Pillow warns of a decompression bomb
URL_WAIT = 20.0  # seconds without an answer
URL_TOTAL = 120.0  # seconds for one download

_STEP = 2**20  # bytes per read
_NAME_LENGTH = 80  # characters of a name that are shown


@dataclass(frozen=True)
class LoadedImage:
    """A decoded image and where it came from; `width` and `height` are the upright file's, in pixels."""

    image: Image
    source: str
    width: int
    height: int


@dataclass
class MediaLoader:
    """Reads sources; standard input is read once and kept, so that `-` may be used again.

    Args:
        base_dir: where relative paths start; the working directory if None.
        allow_urls: fetch `http(s)://` sources.
        stdin: what `-` reads; the process's standard input if None.
    """

    base_dir: Path | None = None
    allow_urls: bool = False
    stdin: BinaryIO | None = None
    _piped: bytes | None = field(default=None, init=False, repr=False)

    def load(self, source: str) -> LoadedImage:
        """Read and decode one source.

        Raises:
            MediaError: if it cannot be found or read, is too large, or is not a whole image.
        """
        data = self._read(source)
        if not data:
            hint = " A pipe can be read only once." if source == "-" else ""
            raise MediaError(f"{_quote(source)} is empty (0 bytes); an image was expected.{hint}")
        image = _decode(data, _quote(source))
        return LoadedImage(image, source, image.width, image.height)

    def _read(self, source: str) -> bytes:
        if source == "-":
            if self._piped is None:
                self._piped = _read_stdin(self.stdin)
            return self._piped
        found = re.match(r"data(?=:)|[a-z][a-z0-9+.-]+(?=://)", source, re.IGNORECASE)
        scheme = found[0].lower() if found else "path"
        if scheme == "data":
            return _read_data_uri(source)
        if scheme in ("http", "https"):
            if not self.allow_urls:
                raise MediaError(
                    f"{_quote(source)} is a URL, and nothing is fetched unless you allow it. "
                    "Add --allow-urls, or download the file and give its path."
                )
            return _read_url(source)
        if scheme not in ("file", "path"):
            raise MediaError(
                f"{_quote(source)} begins with {scheme}://, which is not known. "
                "Known: a path, -, data:, file://, and http(s):// with --allow-urls."
            )
        path = _path_of_uri(source) if scheme == "file" else source
        if not path:
            raise MediaError("an image source is empty: got ''. Give a path, - for standard input, or a URI.")
        return _read_file(Path(self.base_dir or "", os.path.expanduser(path)), source)


def load_image(
    source: str,
    *,
    base_dir: Path | None = None,
    allow_urls: bool = False,
    stdin: BinaryIO | None = None,
) -> Image:
    """Read one source as an upright RGB image; see `MediaLoader` for more than one.

    Raises:
        MediaError: if it cannot be found or read, is too large, or is not a whole image.
    """
    return MediaLoader(base_dir, allow_urls, stdin).load(source).image


def short_name(source: str) -> str:
    """A source on one short line, for display.

    >>> short_name("data:image/png;base64," + 400 * "AAAA")
    'data:image/png (1.2 kB)'
    """
    name = "stdin" if source == "-" else _abbreviate(source)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def _abbreviate(source: str) -> str:
    if source[:5].lower() == "data:":
        header, _, payload = source.partition(",")
        length = len(payload) - 2 * payload.count("%")
        if header.lower().endswith(";base64"):
            length = length * 3 // 4 - payload.count("=")
        return f"{header.split(';')[0][:_NAME_LENGTH]} ({_size(length)})"
    half = _NAME_LENGTH // 2
    return source if len(source) <= _NAME_LENGTH else f"{source[:half]}…{source[1 - half :]}"


def _quote(source: str) -> str:
    return "standard input" if source == "-" else repr(_abbreviate(source))


def _size(length: int) -> str:
    """Bytes in words: 64 B, 1.2 kB, 3.4 MB."""
    if length < 1000:
        return f"{length} B"
    return f"{length / 1e3:.1f} kB" if length < 1e6 else f"{length / 1e6:.1f} MB"


def _read_to_end(read: Callable[[int], bytes], source: str) -> bytes:
    """Read in steps, so that an endless source stops at `MAX_BYTES`."""
    data = bytearray()
    while step := read(_STEP):
        data += step
        _check_bytes(len(data), source)
    return bytes(data)


def _check_bytes(length: int, source: str) -> None:
    if length > MAX_BYTES:
        raise MediaError(
            f"{_quote(source)} is larger than the {_size(MAX_BYTES)} that are read of one image. "
            "Scale it down, or save it as JPEG."
        )


def _read_stdin(stream: BinaryIO | None) -> bytes:
    stream = stream or getattr(sys.stdin, "buffer", None)
    try:
        if stream is None or stream.isatty():
            raise MediaError("- reads an image from standard input, but nothing is piped in. Add `< FILE`.")
        return _read_to_end(stream.read, "-")
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise MediaError(f"standard input cannot be read: {error}. Give a path instead of -.") from error


def _read_data_uri(source: str) -> bytes:
    from urllib.parse import unquote_to_bytes

    header, comma, payload = source.partition(",")
    if not comma:
        raise MediaError(
            f"{_quote(source)} has no comma between its type and its data. Write data:image/png;base64,DATA."
        )
    data = unquote_to_bytes(payload.encode("utf-8", "surrogatepass"))
    if header.lower().endswith(";base64"):
        try:
            data = base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error as error:
            raise MediaError(
                f"{_quote(source)} is not valid base64 ({error}). Is it cut short? "
                "Make one with `base64 FILE`, or give the path."
            ) from error
    _check_bytes(len(data), source)
    return data


def _read_url(url: str) -> bytes:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.parse import quote

    deadline = time.monotonic() + URL_TOTAL
    try:
        with _open_url(quote(url, safe="%/:=&?~#+!$,;'@()*[]")) as response:
            _check_bytes(response.length or 0, url)

            def read(step: int) -> bytes:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it takes longer than {URL_TOTAL:.0f} seconds")
                return response.read1(step)

            return _read_to_end(read, url)
    except HTTPError as error:
        error.close()
        reason: object = f"the server answered {error.code} {error.reason}"
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
    raise MediaError(
        f"{_quote(url)} cannot be fetched: {reason}. Check the address, or download the file and give its path."
    )


def _open_url(url: str) -> HTTPResponse:
    """Open a URL; unlike `urlopen`, follow redirects only to http and https."""
    from urllib import request

    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    # Some hosts refuse Python's own name.
    asked = request.Request(url, headers={"User-Agent": "vlm-cli"})
    return cast("HTTPResponse", opener.open(asked, timeout=URL_WAIT))


def _path_of_uri(uri: str) -> str:
    from urllib.request import url2pathname

    host, _, path = uri[len("file://") :].partition("/")
    if host not in ("", "localhost"):
        raise MediaError(
            f"{_quote(uri)} points to the host {host!r}; only files of this machine are read. "
            "Write file:///PATH with three slashes, or just the path."
        )
    return url2pathname("/" + path)


def _read_file(path: Path, source: str) -> bytes:
    name = _quote(source)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(f"{name} is a directory. Give one of its files. {_listing(path)}")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe may wait, and reading a device never end
            raise MediaError(f"{name} is a pipe or device, not a file. A pipe is read by `--image - < PIPE`.")
        _check_bytes(status.st_size, source)
        with path.open("rb") as file:
            return _read_to_end(file.read, source)
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(f"cannot find {name}: {_why_missing(path)}") from None
    except PermissionError:
        raise MediaError(
            f"{name} may not be read by this user. Change that with `chmod +r`, or copy the file."
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:  # NUL, lone surrogate
            raise MediaError(
                f"{name} cannot be a file name here. Was a path meant? "
                "An image itself is given as data:image/png;base64,DATA."
            ) from None
        raise MediaError(f"{name} cannot be read: {error.strerror}.") from error


def _why_missing(path: Path) -> str:
    """Name the first part of a path that is not there, and what is there instead."""
    path = Path(os.path.abspath(path))
    missing = next((p for p in [*reversed(path.parents), path] if not os.path.exists(p)), path)
    folder = missing.parent
    if missing.is_symlink():
        return f"{str(missing)!r} is a link to {os.readlink(missing)!r}, which does not exist."
    if not folder.is_dir():
        return f"{str(folder)!r} is a file, not a folder."
    return f"there is no {missing.name!r} in {str(folder)!r}. {_listing(folder, missing.name)}"


def _listing(folder: Path, wanted: str = "") -> str:
    """The names nearest to `wanted`, or else a few of what is there."""
    try:
        names = {name.lower(): name for name in sorted(os.listdir(folder)) if not name.startswith(".")}
    except OSError:
        return "That folder cannot be listed."
    if near := difflib.get_close_matches(wanted.lower(), list(names)[:5000], n=3):
        return f"Did you mean {' or '.join(repr(names[n]) for n in near)}?"
    shown = [repr(name) for name in names.values()][:5]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"It holds {', '.join(shown)}{more}." if shown else "It is empty."


# First bytes of what people take for images, or of an image whose rest is missing.
_KINDS = (
    (b"\x89PNG|\xff\xd8\xff|GIF8|BM|II\\*\0|MM\0\\*|RIFF....WEBP", "an image, damaged or cut short"),
    (b"%PDF", "a PDF"),
    (b"\\s*<svg|\\s*<\\?xml", "SVG or XML"),
    (b"(?i)\\s*<!doctype html|\\s*<html", "a web page"),
    (b"version https://git-lfs", "a Git LFS pointer; `git lfs pull` fetches the image"),
    (b"....ftyp(heic|heix|mif1|hevc)", "HEIC"),
    (b"....ftyp|\x1aE\xdf\xa3", "a video"),
    (b"PK\3\4|\x1f\x8b", "an archive"),
)


def _not_an_image(data: bytes, name: str) -> str:
    kind = next((f" ({kind})" for start, kind in _KINDS if re.match(start, data, re.DOTALL)), "")
    return (
        f"{name} is not an image that Pillow can read: it begins with {data[:12]!r}{kind}. "
        "Give a PNG, JPEG, WebP or the like."
    )


def _decode(data: bytes, name: str) -> Image:
    """Decode the first frame, whole."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        _check_pixels(*image.size, name)
        if image.format == "EPS":  # decoding one runs Ghostscript on it
            raise MediaError(f"{name} is a PostScript program, which is not run. Convert it to PNG.")
        if image.format == "JPEG2000" and not _has_all_tiles(data):
            raise EOFError("its last tiles are missing")
        image.load()
        return _to_rgb(_upright(image), name)
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError(_not_an_image(data, name)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{name} has too many pixels. {error} Scale it down first.") from None
    except Exception as error:  # for damaged files, Pillow's plugins raise whatever they stumble over
        raise MediaError(
            f"{name} is damaged or cut short: {str(error) or type(error).__name__}. Fetch or save it again."
        ) from error


def _check_pixels(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} has {width} × {height} = {width * height:,} pixels; at most {MAX_PIXELS:,} are read, "
            "for more may be a decompression bomb. Scale it down first."
        )
    if width < 1 or height < 1:
        raise MediaError(f"{name} has no pixels: it is {width} × {height}. Save it again.")


def _has_all_tiles(jpeg2000: bytes) -> bool:
    """Whether the end of the codestream follows the last tile; Pillow leaves missing tiles gray.

    Source: ITU-T T.800, table A.1 (SOT is FF90, EOC is FFD9; coded data holds neither).
    """
    return jpeg2000.rfind(b"\xff\xd9") > jpeg2000.rfind(b"\xff\x90")


def _upright(image: Image) -> Image:
    """Apply the EXIF orientation; one that cannot be read counts as upright, as in other viewers."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # as in `_decode`
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
    """Convert as Pillow does (alpha is dropped), but scale what has more than 8 bits."""
    if image.mode[0] == "I" or image.mode == "F":
        image = _to_8_bits(image, name)
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the direct way gives the same, with a warning
    rgb = image.convert("RGB")
    rgb.info = {}  # with its EXIF kept, the next reader would turn the image again
    return rgb


def _to_8_bits(image: Image, name: str) -> Image:
    """Scale 16-bit, 32-bit and float grays, which Pillow would clip to white.

    A file does not say what is white. We take the first range that holds all its values:

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
