"""The size of each medium of a prompt, from the headers of its files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm_cli.prompt import Medium, Text
from vlm_cli.tiling import MediumSize

if TYPE_CHECKING:
    from vlm_cli.media import MediaLoader

__all__ = ["measure_media"]


def measure_media(parts: Sequence[Text | Medium], loader: MediaLoader) -> list[MediumSize]:
    """Return the size of each medium of a prompt, in reading order. No pixel is decoded.

    Args:
        parts: the prompt.
        loader: finds the files of clips.

    Raises:
        PromptError: for settings of a clip that cannot be read.
        MediaError: if a clip cannot be found or read, or is damaged.
    """
    media = [part for part in parts if isinstance(part, Medium)]
    return [MediumSize(loader.count_frames(x.source)) if x.kind == "video" else MediumSize() for x in media]
