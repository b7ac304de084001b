"""Check the pictures and clips of records: only their headers are read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from vlm_cli.data.jsonl import RecordError
from vlm_cli.errors import MediaError, PromptError
from vlm_cli.media import MediaLoader, short_name
from vlm_cli.media.decode import check_header
from vlm_cli.media.sources import INSIDE
from vlm_cli.prompt import Medium

__all__ = ["MediaCheck"]


@dataclass
class MediaCheck:
    """Check each image and clip once, without decoding it."""

    loader: MediaLoader
    known: dict[Medium, str | None] = field(default_factory=dict)  # medium -> its problem, or None

    def check(self, media: Sequence[Medium], *, thorough: bool) -> None:
        """Check the images and clips of one record.

        Args:
            media: with paths or URIs.
            thorough: find out why an image cannot be read, which may take a while.

        Raises:
            RecordError: for the first one that cannot be read.
        """
        for medium in media:
            if medium not in self.known:
                self.known[medium] = self._find_problem(medium, thorough)
            if (problem := self.known[medium]) is not None:
                raise RecordError(problem)

    def _find_problem(self, medium: Medium, thorough: bool) -> str | None:
        source = medium.source
        if source.partition("?")[0] == "-" or source.lower().startswith(("http://", "https://")):
            return f"{short_name(source)!r} is no file: records name files or data: URIs. Download it first."
        if medium.kind == "video":
            return self._problem_of_clip(source)
        if self._has_image_header(source):
            return None
        if not thorough:
            return f"{short_name(source)!r} cannot be read."
        try:
            self.loader.load(source)
        except MediaError as error:
            return str(error)
        return None

    def _problem_of_clip(self, source: str) -> str | None:
        try:
            self.loader.count_frames(source)
        except (MediaError, PromptError) as error:
            return str(error)
        return None

    def _has_image_header(self, source: str) -> bool:
        try:
            if source.startswith(INSIDE):
                return check_header(io.BytesIO(self.loader.read(source)), self.loader.max_pixels)
            path = self.loader.find(source)
            if not path.is_file():
                return False
            with path.open("rb") as file:
                return check_header(file, self.loader.max_pixels)
        except (MediaError, OSError, ValueError):  # `MediaLoader` then says what is wrong
            return False
