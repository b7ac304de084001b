"""From a source to an image or a clip: read its bytes, then decode them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vlm_cli.errors import MediaError
from vlm_cli.lookalike import find_lookalike
from vlm_cli.media.clip import Clip, open_clip
from vlm_cli.media.decode import MAX_PIXELS, decode_image, measure_image
from vlm_cli.media.frame_folder import FrameFolder
from vlm_cli.media.request import ClipRequest, name_frame
from vlm_cli.media.sources import (
    INSIDE,
    find_file,
    find_local,
    is_address,
    is_uri,
    open_file,
    quote_source,
    read_source,
    read_stdin,
)

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ChosenFrames", "LoadedClip", "LoadedImage", "MediaLoader"]

MAX_CLIP = 4  # as many pixels as one image may have, of all frames of a clip together

_MOST_SIZES = 4_096  # of images, which a loader remembers
_MOST_KEPT = 2**26  # bytes of addresses that were measured and not yet loaded


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

    @property
    def frames(self) -> tuple[Image, ...]:
        """The image, as the only frame of a medium."""
        return (self.image,)


@dataclass(frozen=True)
class ChosenFrames:
    """Which frames of a clip are read, known without decoding one.

    Attributes:
        indices: of the frames, in the clip.
        seconds: from the clip's first frame to each of them; None if the frames have no times.
        duration: of the clip in seconds; None if its frames have no times.
    """

    indices: tuple[int, ...]
    seconds: tuple[float, ...] | None
    duration: float | None

    def describe(self) -> str:
        """Say in words which frames these are: `8 frames from 0.00 to 59.96 s`."""
        count = f"{len(self.indices)} frame{'' if len(self.indices) == 1 else 's'}"
        if self.seconds is None:
            return count
        if len(self.seconds) == 1:
            return f"{count} at {self.seconds[0]:.2f} s"
        return f"{count} from {self.seconds[0]:.2f} to {self.seconds[-1]:.2f} s"


@dataclass(frozen=True)
class LoadedClip:
    """The frames of a clip that are read, and its source.

    Attributes:
        frames: upright RGB.
        source: where the clip was read.
        width: of a frame, in pixels.
        height: the same.
        chosen: which frames these are.
        notes: what the user should know of the decoding.
    """

    frames: tuple[Image, ...]
    source: str
    width: int
    height: int
    chosen: ChosenFrames
    notes: tuple[str, ...] = ()

    def split(self) -> list[LoadedClip]:
        """Return each frame as a clip of its own; the first has the notes."""
        seconds = self.chosen.seconds
        return [
            LoadedClip(
                (frame,),
                name_frame(self.source, index),
                frame.width,
                frame.height,
                ChosenFrames((index,), None if seconds is None else (seconds[i],), self.chosen.duration),
                () if i else self.notes,
            )
            for i, (frame, index) in enumerate(zip(self.frames, self.chosen.indices, strict=True))
        ]


@dataclass
class MediaLoader:
    """Load images from paths, URIs, URLs and standard input (see `sources`).

    The loader reads standard input once and keeps its bytes, so that `-` may stand for the same image twice. It fetches
    an address once to measure and to load it.

    Args:
        base_dir: the folder where relative paths start; the working directory if None.
        allow_urls: fetch `http(s)://` sources.
        allow_hosts: hosts that may have an internal address.
        media_root: the folder that holds every path; None allows each path.
        max_pixels: the most pixels that are decoded of one image; None takes `MAX_PIXELS`.
        stdin: the stream that `-` reads; the standard input of the process if None.
        inside: returns the bytes of a source inside a data set, `inside:…`; None outside of one.
    """

    base_dir: Path | None = None
    allow_urls: bool = False
    allow_hosts: tuple[str, ...] = ()
    media_root: Path | None = None
    max_pixels: int | None = None
    stdin: BinaryIO | None = None
    inside: Callable[[str], bytes] | None = None
    _piped: bytes | None = field(default=None, init=False, repr=False)
    _fetched: dict[str, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)
    _sizes: dict[str, tuple[int, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def load(self, source: str) -> LoadedImage:
        """Read and decode one source.

        Raises:
            MediaError: if the source cannot be found or read, is too large, or is not a whole image.
        """
        data = self.read(source)
        found = decode_image(data, quote_source(source), self.max_pixels)
        notes = [*found.notes, *self._lookalike_note(source)]
        return LoadedImage(found.image, source, found.width, found.height, tuple(notes))

    def measure(self, source: str) -> tuple[int, int]:
        """Return the width and height in pixels that `load` would tell, from the header of the file.

        Raises:
            MediaError: if the source cannot be found or read, is too large, or is no image.
        """
        if source not in self._sizes:
            if len(self._sizes) >= _MOST_SIZES:
                self._sizes.clear()
            data = self.read(source, keep=True)
            self._sizes[source] = measure_image(data, quote_source(source), self.max_pixels)
        return self._sizes[source]

    def read(self, source: str, *, keep: bool = False) -> bytes:
        """Read the bytes of a source; with `keep`, those of an address are kept until they are read once more.

        Raises:
            MediaError: if there are none, or the source cannot be found or read.
        """
        data = self._read(source, keep=keep)
        if not data:
            hint = " A pipe can be read only once." if source == "-" else ""
            raise MediaError(f"{quote_source(source)} is empty (0 bytes); an image was expected.{hint}")
        return data

    def load_clip(self, source: str) -> LoadedClip:
        """Read a clip, and decode the frames that its source asks for (see `media.request`).

        Raises:
            PromptError: for settings behind the `?` that cannot be read.
            MediaError: if the clip cannot be found or read, has no frames, or is damaged.
        """
        request = ClipRequest.parse(source)
        with self._open_clip(request) as clip:
            chosen = self._choose(clip, request)
            frames: list[Image] = []
            limit = MAX_CLIP * (MAX_PIXELS if self.max_pixels is None else self.max_pixels)
            for frame in clip.read(chosen.indices):
                frames.append(frame)
                if frame.width * frame.height * len(chosen.indices) > limit:
                    raise MediaError(
                        f"{len(chosen.indices)} frames of {quote_source(source)} have too many pixels: "
                        f"{frame.width} × {frame.height} each; vlm reads at most {limit:,} of one clip. Give fewer "
                        "frames with ?frames=N, or allow more pixels of an image with --max-pixels."
                    )
        notes = tuple(self._lookalike_note(request.path))
        return LoadedClip(tuple(frames), source, frames[0].width, frames[0].height, chosen, notes)

    def load_medium(self, source: str, kind: str) -> LoadedImage | LoadedClip:
        """Load an image, or a clip if the kind is "video".

        Raises:
            PromptError, MediaError: as in `load` and `load_clip`.
        """
        return self.load_clip(source) if kind == "video" else self.load(source)

    def choose_frames(self, source: str) -> ChosenFrames:
        """Say which frames of a clip its source asks for. No frame of a video file is decoded.

        Raises:
            PromptError, MediaError: as in `load_clip`.
        """
        request = ClipRequest.parse(source)
        with self._open_clip(request, keep=True) as clip:
            return self._choose(clip, request)

    def count_frames(self, source: str) -> int:
        """Count the frames of a clip that its source asks for; from the header alone, if that says enough.

        Raises:
            PromptError, MediaError: as in `load_clip`.
        """
        request = ClipRequest.parse(source)
        with self._open_clip(request, keep=True) as clip:
            if clip.stated is not None and request.most is not None and request.is_whole:
                return min(clip.stated, request.most)
            return len(self._choose(clip, request).indices)

    @contextmanager
    def _open_clip(self, request: ClipRequest, *, keep: bool = False) -> Iterator[Clip]:
        name = quote_source(request.path)
        path = find_local(request.path, base_dir=self.base_dir, media_root=self.media_root)
        if path is not None and path.is_dir():
            yield FrameFolder(path, name, lambda file: self.load(file).image)
            return
        file = (
            io.BytesIO(self._read(request.path, keep=keep))
            if path is None
            else open_file(path, request.path, "--video")
        )
        with file:
            yield open_clip(file, name, self.max_pixels)

    def _choose(self, clip: Clip, request: ClipRequest) -> ChosenFrames:
        timeline = clip.timeline()
        indices = timeline.choose(request, quote_source(request.path))
        found = [timeline.seconds(i) for i in indices]
        seconds = tuple(x for x in found if x is not None)
        return ChosenFrames(tuple(indices), seconds if len(seconds) == len(found) else None, timeline.duration)

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

    def _read(self, source: str, *, keep: bool = False) -> bytes:
        """Read the bytes of a source; with `keep`, those of an address are kept until they are read once more."""
        if source == "-":
            if self._piped is None:
                self._piped = read_stdin(self.stdin)
            return self._piped
        if self.inside is not None and source.startswith(INSIDE):
            return self.inside(source)
        data = self._fetched.pop(source, None)
        if data is None:
            data = read_source(
                source,
                base_dir=self.base_dir,
                allow_urls=self.allow_urls,
                allow_hosts=self.allow_hosts,
                media_root=self.media_root,
            )
        if keep and is_address(source):
            self._fetched[source] = data
            while sum(map(len, list(self._fetched.values()))) > _MOST_KEPT:
                self._fetched.pop(next(iter(self._fetched)), None)
        return data
