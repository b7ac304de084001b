"""From a source to an image: read its bytes, then decode them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vlm_cli.errors import MediaError
from vlm_cli.lookalike import find_lookalike
from vlm_cli.media.decode import decode_image
from vlm_cli.media.sources import find_file, is_uri, quote_source, read_source, read_stdin

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LoadedImage", "MediaLoader"]


@dataclass(frozen=True)
class LoadedImage:
    """A decoded image and its source.

    Attributes:
        image: upright RGB; of a large photograph, at a smaller size than the file's.
        source: where it was read.
        width: of the upright image in the file, in pixels.
        height: the same.
        notes: what the user should know of the decoding, such as "first frame of an animation".
    """

    image: Image
    source: str
    width: int
    height: int
    notes: tuple[str, ...] = ()


@dataclass
class MediaLoader:
    """Load images from paths, URIs, URLs and standard input (see `sources`).

    The loader reads standard input once and keeps its bytes, so that `-` may stand for the same image twice.

    Args:
        base_dir: the folder where relative paths start; the working directory if None.
        allow_urls: fetch `http(s)://` sources.
        allow_hosts: hosts that may have an internal address.
        media_root: the folder that holds every path; None allows each path.
        max_pixels: the most pixels that are decoded of one image; None takes `MAX_PIXELS`.
        stdin: the stream that `-` reads; the standard input of the process if None.
    """

    base_dir: Path | None = None
    allow_urls: bool = False
    allow_hosts: tuple[str, ...] = ()
    media_root: Path | None = None
    max_pixels: int | None = None
    stdin: BinaryIO | None = None
    _piped: bytes | None = field(default=None, init=False, repr=False)

    def load(self, source: str) -> LoadedImage:
        """Read and decode one source.

        Raises:
            MediaError: if the source cannot be found or read, is too large, or is not a whole image.
        """
        data = self._read(source)
        if not data:
            hint = " A pipe can be read only once." if source == "-" else ""
            raise MediaError(f"{quote_source(source)} is empty (0 bytes); an image was expected.{hint}")
        found = decode_image(data, quote_source(source), self.max_pixels)
        notes = [*found.notes, *self._lookalike_note(source)]
        return LoadedImage(found.image, source, found.width, found.height, tuple(notes))

    def _lookalike_note(self, source: str) -> list[str]:
        """Say under which name an image was found, if that only looks like the name in the prompt."""
        if is_uri(source):
            return []
        found = find_lookalike(Path(self.base_dir or "", os.path.expanduser(source)))
        return [] if found is None else [f"its file is called {found.name!a}"]

    def find(self, source: str) -> Path:
        """Return the path of a source that is a path.

        Raises:
            MediaError: if it leads out of the media root.
        """
        return find_file(source, source, base_dir=self.base_dir, media_root=self.media_root)

    def _read(self, source: str) -> bytes:
        if source != "-":
            return read_source(
                source,
                base_dir=self.base_dir,
                allow_urls=self.allow_urls,
                allow_hosts=self.allow_hosts,
                media_root=self.media_root,
            )
        if self._piped is None:
            self._piped = read_stdin(self.stdin)
        return self._piped
