"""Read the bytes of an image from wherever it is kept.

A source is a path (also `~/…` and `file://…`), `-` for standard input, a `data:` URI or, where the caller allows it, an
`http(s)://` URL. A source that could hang (a pipe, a device, a slow server) or fill the memory is an error. So is a
path that leads out of the media root, if the caller names one; links are resolved first.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import errno
import os
import re
import stat
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

from vlm_cli.errors import MediaError
from vlm_cli.lookalike import find_lookalike

__all__ = [
    "INSIDE",
    "MAX_BYTES",
    "find_file",
    "find_local",
    "is_address",
    "is_uri",
    "open_file",
    "quote_source",
    "read_source",
    "read_stdin",
    "short_name",
]

INSIDE = "inside:"  # scheme of a source inside a data set: `MediaLoader.inside` reads it
MAX_BYTES = 256 * 2**20  # bytes of one encoded image

_STEP = 2**20  # bytes per read
_NAME_LENGTH = 80  # characters of a name that are shown


def read_source(
    source: str,
    *,
    base_dir: Path | None = None,
    allow_urls: bool = False,
    allow_hosts: Collection[str] = (),
    media_root: Path | None = None,
) -> bytes:
    """Read the bytes of a path, a `data:` URI or a URL.

    Args:
        source: the path or URI; not `-`, which `read_stdin` reads.
        base_dir: the folder where a relative path starts; the working directory if None.
        allow_urls: fetch `http(s)://` sources.
        allow_hosts: hosts that may have an internal address.
        media_root: the folder that holds every path; None allows each path.

    Raises:
        MediaError: if the source cannot be found or read, or is too large.
    """
    scheme = _scheme(source)
    if scheme == "data":
        return _read_data_uri(source)
    if scheme in ("http", "https"):
        if not allow_urls:
            raise MediaError(
                f"{quote_source(source)} is a URL, and vlm fetches nothing unless you allow it. "
                "Add --allow-urls, or download the file and give its path."
            )
        return _read_url(source, allow_hosts)
    if scheme == "inside":
        raise MediaError(
            f"{quote_source(source)} names a picture inside a data set, which only that data set can show."
        )
    if scheme not in ("file", "path"):
        raise MediaError(
            f"{quote_source(source)} begins with {scheme}://, which is not known. "
            "Known: a path, -, data:, file://, and http(s):// with --allow-urls."
        )
    path = find_local(source, base_dir=base_dir, media_root=media_root)
    assert path is not None
    return _read_file(path, source)


def find_local(source: str, *, base_dir: Path | None = None, media_root: Path | None = None) -> Path | None:
    """Return where a path or a `file://` URI leads; None for a source of another kind. See `find_file`."""
    scheme = _scheme(source)
    if source == "-" or scheme not in ("file", "path"):
        return None
    path = _path_of_uri(source) if scheme == "file" else source
    if not path:
        raise MediaError("an image source is empty: got ''. Give a path, - for standard input, or a URI.")
    return find_file(path, source, base_dir=base_dir, media_root=media_root)


def _scheme(source: str) -> str:
    """Return the scheme of a URI, in small letters, or `path`."""
    found = re.match(r"(data|inside)(?=:)|[a-z][a-z0-9+.-]+(?=://)", source, re.IGNORECASE)
    return found[0].lower() if found else "path"


def is_uri(source: str) -> bool:
    """Tell whether a source is a URI or standard input, and not a plain path."""
    return source == "-" or _scheme(source) != "path"


def is_address(source: str) -> bool:
    """Tell whether a source is an address in a network."""
    return _scheme(source) not in ("path", "data", "inside")


def find_file(path: str, source: str, *, base_dir: Path | None, media_root: Path | None) -> Path:
    """Return where a path leads; with a media root, after a check that this is inside of it, links resolved.

    Args:
        path: as the user or a record wrote it; it may begin with `~/`.
        source: what messages call it.
        base_dir: the folder where a relative path starts; the working directory if None.
        media_root: the folder that holds every path; None allows each path.

    Raises:
        MediaError: if the path leads out of the media root. The message does not say whether the file exists.
    """
    file = Path(base_dir or "", os.path.expanduser(path))
    file = find_lookalike(file) or file
    if media_root is None:
        return file
    try:
        real = Path(os.path.realpath(file))
    except (OSError, ValueError):
        real = file  # no name that the system knows
    if not real.is_relative_to(os.path.realpath(media_root)):
        raise MediaError(
            f"{quote_source(source)} leads out of the media root {str(media_root)!r}, and vlm reads images only from "
            "there. Move the image into it, or give another --media-root."
        )
    return real


def read_stdin(stream: BinaryIO | None = None) -> bytes:
    """Read standard input, or another stream, to its end.

    Raises:
        MediaError: if nothing is piped in, or the stream cannot be read.
    """
    stream = stream or getattr(sys.stdin, "buffer", None)
    try:
        if stream is None or stream.isatty():
            raise MediaError("- reads an image from standard input, but nothing is piped in. Add `< FILE`.")
        return _read_to_end(stream.read, "-")
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        raise MediaError(
            f"standard input cannot be read: {error}. Give a path instead of -.",
            public="standard input cannot be read.",
        ) from error


def short_name(source: str) -> str:
    """Shorten the name of a source to one line, for display.

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
        return f"{header.split(';')[0][:_NAME_LENGTH]} ({_format_bytes(length)})"
    half = _NAME_LENGTH // 2
    return source if len(source) <= _NAME_LENGTH else f"{source[:half]}…{source[1 - half :]}"


def quote_source(source: str) -> str:
    """Quote a source for a message, abbreviated."""
    return "standard input" if source == "-" else repr(_abbreviate(source))


def _format_bytes(length: int) -> str:
    """Write a number of bytes with its unit: 64 B, 1.2 kB, 3.4 MB."""
    if length < 1000:
        return f"{length} B"
    return f"{length / 1e3:.1f} kB" if length < 1e6 else f"{length / 1e6:.1f} MB"


def _read_to_end(read: Callable[[int], bytes], source: str) -> bytes:
    """Read in steps, so that an endless source is an error at `MAX_BYTES`."""
    data = bytearray()
    while step := read(_STEP):
        data += step
        _check_bytes(len(data), source)
    return bytes(data)


def _check_bytes(length: int, source: str) -> None:
    if length > MAX_BYTES:
        raise MediaError(
            f"{quote_source(source)} is larger than the {_format_bytes(MAX_BYTES)} that vlm reads of one image. "
            "Scale it down, or save it as JPEG."
        )


def _read_data_uri(source: str) -> bytes:
    from urllib.parse import unquote_to_bytes

    header, comma, payload = source.partition(",")
    if not comma:
        raise MediaError(
            f"{quote_source(source)} has no comma between its type and its data. Write data:image/png;base64,DATA."
        )
    data = unquote_to_bytes(payload.encode("utf-8", "surrogatepass"))
    if header.lower().endswith(";base64"):
        try:
            data = base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error as error:
            raise MediaError(
                f"{quote_source(source)} is not valid base64 ({error}). Is it cut short? "
                "Make one with `base64 FILE`, or give the path.",
                public=f"{quote_source(source)} is not valid base64. Is it cut short?",
            ) from error
    _check_bytes(len(data), source)
    return data


def _read_url(url: str, allow_hosts: Collection[str]) -> bytes:
    from http.client import HTTPException
    from urllib.error import HTTPError

    from vlm_cli.network import open_url

    try:
        with open_url(url, allow_hosts=allow_hosts) as download:
            _check_bytes(download.length or 0, url)
            return _read_to_end(download.read, url)
    except HTTPError as error:
        error.close()
        reason: object = f"the server answered {error.code} {error.reason}"
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
    raise MediaError(
        f"{quote_source(url)} cannot be fetched: {reason}. Check the address, or download the file and give its path.",
        public=f"{quote_source(url)} cannot be fetched.",
    )


def _path_of_uri(uri: str) -> str:
    from urllib.request import url2pathname

    host, _, path = uri[len("file://") :].partition("/")
    if host not in ("", "localhost"):
        raise MediaError(
            f"{quote_source(uri)} points to the host {host!r}; vlm reads only files of this machine. "
            "Write file:///PATH with three slashes, or just the path."
        )
    return url2pathname("/" + path)


def _read_file(path: Path, source: str) -> bytes:
    with open_file(path, source) as file:
        try:
            _check_bytes(os.fstat(file.fileno()).st_size, source)
            return _read_to_end(file.read, source)
        except OSError as error:
            raise MediaError(f"{quote_source(source)} cannot be read: {error.strerror}.") from error


def open_file(path: Path, source: str, flag: str = "--image") -> BinaryIO:
    """Open a file for reading.

    Args:
        path: the file.
        source: what the user wrote for it.
        flag: the option that reads such a file from a pipe.

    Raises:
        MediaError: if there is no such file, it may not be read, or it is a folder, a pipe or a device.
    """
    name = quote_source(source)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            words = f"{name} is a directory. Give one of its files."
            raise MediaError(f"{words} {_list_names(path)}", public=words)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe may wait for ever, and a device may never end
            raise MediaError(f"{name} is a pipe or device, not a file. A pipe is read by `{flag} - < PIPE`.")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError(f"cannot find {name}: {_explain_missing(path)}", public=f"cannot find {name}.") from None
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


def _explain_missing(path: Path) -> str:
    """Name the first part of a path that does not exist, and the nearest names beside it."""
    path = Path(os.path.abspath(path))
    missing = next((p for p in [*reversed(path.parents), path] if not os.path.exists(p)), path)
    folder = missing.parent
    if missing.is_symlink():
        return f"{str(missing)!r} is a link to {os.readlink(missing)!r}, which does not exist."
    if not folder.is_dir():
        return f"{str(folder)!r} is a file, not a folder."
    return f"there is no {missing.name!r} in {str(folder)!r}. {_list_names(folder, missing.name)}"


def _list_names(folder: Path, wanted: str = "") -> str:
    """List the names in a folder that are nearest to `wanted`, or else the first five."""
    try:
        names = {name.lower(): name for name in sorted(os.listdir(folder)) if not name.startswith(".")}
    except OSError:
        return "That folder cannot be listed."
    if near := difflib.get_close_matches(wanted.lower(), list(names)[:5000], n=3):
        return f"Did you mean {' or '.join(repr(names[n]) for n in near)}?"
    shown = [repr(name) for name in names.values()][:5]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"It holds {', '.join(shown)}{more}." if shown else "It is empty."
