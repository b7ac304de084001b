"""A folder of pictures as a clip: its files are the frames, in the order of the numbers in their names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_cli.errors import MediaError
from vlm_cli.media.timeline import Timeline

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FrameFolder"]

_PICTURE = re.compile(r"(?i)[^.].*\.(png|jpe?g|jfif|gif|bmp|webp|tiff?|avif|jp2|ppm|pgm)")


class FrameFolder:
    """Frames that lie side by side in a folder. Files that are no pictures are left alone.

    Args:
        folder: the folder.
        name: what messages call it.
        load: reads one picture.

    Raises:
        MediaError: if the folder cannot be listed, or holds no picture.
    """

    def __init__(self, folder: Path, name: str, load: Callable[[str], Image]) -> None:
        self.load = load
        try:
            names = [entry.name for entry in os.scandir(folder) if _PICTURE.fullmatch(entry.name)]
        except OSError as error:
            raise MediaError(f"{name} cannot be listed: {error.strerror}.") from None
        if not names:
            raise MediaError(
                f"{name} is a folder without pictures. Give a folder of frames (PNG, JPEG), or a video file."
            )
        self.files = [str((folder / x).absolute()) for x in sorted(names, key=_number_key)]
        self.stated: int | None = len(names)

    def timeline(self) -> Timeline:
        """Return the order of the frames; they have no times."""
        return Timeline(range(len(self.files)), len(self.files), None)

    def read(self, chosen: Sequence[int]) -> Iterator[Image]:
        """Yield the frames with these indices."""
        for index in chosen:
            yield self.load(self.files[index])


def _number_key(name: str) -> list[tuple[int, int, str]]:
    """Return what sorts `frame2` before `frame10`."""
    pieces = re.split(r"(\d+)", name, flags=re.ASCII)
    return [(1, int(x), x) if i % 2 else (0, 0, x) for i, x in enumerate(pieces)]
