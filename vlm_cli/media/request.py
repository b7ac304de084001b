"""What a user asks of a clip: the file, and after a `?` how many of its frames, from where to where.

    clip.mp4?frames=8               8 frames, evenly from the first to the last
    clip.mp4?fps=1&start=30&end=60  about one frame a second of this half minute
    clip.mp4?frame=24               the frame after the first 24

Without settings a clip gives `DEFAULT_FRAMES` frames. The last `?` begins the settings, if a setting that vlm knows
stands behind it. So an address keeps its own query, and a source that ends in `?` has no settings:

    https://example.org/clip?token=1             the address has a query
    https://example.org/clip?token=1?frames=4    and 4 frames of it
    clip?frames=8?                               the file "clip?frames=8"
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from vlm_cli.errors import PromptError
from vlm_cli.media.sources import quote_source

__all__ = ["DEFAULT_FRAMES", "MAX_FRAMES", "ClipRequest", "name_frame"]

DEFAULT_FRAMES = 8
MAX_FRAMES = 1024  # of one clip

_KEYS = ("frames", "fps", "start", "end", "frame")
_SETTINGS = re.compile(r"[A-Za-z_]+=[^&?]*(&[A-Za-z_]+=[^&?]*)*")
_EXAMPLE = "Write, for instance, <video:clip.mp4?frames=8> or <video:clip.mp4?fps=1&start=30&end=60>."


@dataclass(frozen=True)
class ClipRequest:
    """A clip, and which of its frames are read.

    Attributes:
        path: a path, URI or URL, or `-`.
        frames: how many frames at most; None if `fps` says it, or nothing does.
        fps: frames for each second.
        start: seconds after the first frame at which the part begins that is read.
        end: seconds after the first frame at which it ends; None for the end of the clip.
        frame: the only frame that is read, counted from 0; None if the others say it.
    """

    path: str
    frames: int | None = None
    fps: float | None = None
    start: float = 0.0
    end: float | None = None
    frame: int | None = None

    @classmethod
    def parse(cls, source: str) -> ClipRequest:
        """Read a source.

        >>> ClipRequest.parse("a.mp4?frames=4")
        ClipRequest(path='a.mp4', frames=4, fps=None, start=0.0, end=None, frame=None)

        Raises:
            PromptError: for a setting that is unknown, has a wrong value, or contradicts another.
        """
        path, mark, tail = source.rpartition("?")
        if not mark or not path:
            return cls(source)
        if not tail:
            return cls(path)
        if not _SETTINGS.fullmatch(tail):
            return cls(source)
        pairs = [pair.split("=", 1) for pair in tail.split("&")]
        if not _are_settings([key for key, _ in pairs], source):
            return cls(source)
        values: dict[str, float] = {}
        for key, text in pairs:
            if key not in _KEYS:
                near = difflib.get_close_matches(key, _KEYS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise _refuse(source, f"unknown setting {key!r}.{hint} Known: {', '.join(_KEYS)}")
            if key in values:
                raise _refuse(source, f"{key} is given twice. Give it once")
            values[key] = _read_number(source, key, text)
        return cls._of(source, path, values)

    @classmethod
    def _of(cls, source: str, path: str, values: dict[str, float]) -> ClipRequest:
        if "frames" in values and "fps" in values:
            raise _refuse(source, "frames and fps both say how many frames are read. Give one of them")
        if "frame" in values and len(values) > 1:
            raise _refuse(source, "frame names the only frame that is read. Give it alone")
        start, end = values.get("start", 0.0), values.get("end")
        if end is not None and end <= start:
            raise _refuse(
                source, f"the part that is read ends at {end:g} s, and begins at {start:g} s. Give a later end"
            )
        frames, frame = (None if (x := values.get(key)) is None else int(x) for key in ("frames", "frame"))
        return cls(path, frames, values.get("fps"), start, end, frame)

    @property
    def most(self) -> int | None:
        """The most frames that the request asks for; None if that depends on how long the clip is."""
        if self.frame is not None:
            return 1
        return (self.frames or DEFAULT_FRAMES) if self.fps is None else None

    @property
    def is_whole(self) -> bool:
        """Whether frames of the whole clip are read, and not of a part."""
        return self.start == 0 and self.end is None


def name_frame(source: str, index: int) -> str:
    """Return the source of one frame of a clip.

    >>> name_frame("a.mp4?fps=1", 24)
    'a.mp4?frame=24'
    """
    return f"{ClipRequest.parse(source).path}?frame={index}"


def _are_settings(keys: list[str], source: str) -> bool:
    """Tell whether what stands behind the last `?` is settings, and not part of a name or an address."""
    if re.match(r"(?i)https?://", source):
        return all(key in _KEYS for key in keys)
    return any(key in _KEYS or difflib.get_close_matches(key, _KEYS, n=1) for key in keys)


def _read_number(source: str, key: str, text: str) -> float:
    is_plain = len(text) < 20 and re.fullmatch(
        r"\d+" if key.startswith("frame") else r"\d+(\.\d*)?|\.\d+", text, re.ASCII
    )
    value = float(text) if is_plain else math.nan
    if key == "frames":
        if not 1 <= value <= MAX_FRAMES:
            raise _refuse(source, f"frames expects a whole number from 1 to {MAX_FRAMES:,}, got {text[:40]!r}")
    elif key == "frame":
        if not value <= 2**31:
            raise _refuse(source, f"frame expects a whole number from 0, got {text[:40]!r}")
    elif key == "fps":
        if not 0 < value <= 1000:
            raise _refuse(
                source, f"fps expects frames for each second, more than 0 and at most 1000, got {text[:40]!r}"
            )
    elif not value <= 1e7:
        raise _refuse(source, f"{key} expects a number of seconds, such as 2.5, got {text[:40]!r}")
    return value


def _refuse(source: str, words: str) -> PromptError:
    return PromptError(f"the clip {quote_source(source)}: {words}. {_EXAMPLE}")
