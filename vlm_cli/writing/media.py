"""The size of each medium of a prompt, from the headers of its files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm_cli.prompt import Medium, Text
from vlm_cli.tiling import MediumSize

if TYPE_CHECKING:
    from vlm_cli.image_processor import OpenCLIPImageProcessor
    from vlm_cli.media import MediaLoader

__all__ = ["measure_media"]


def measure_media(
    parts: Sequence[Text | Medium], loader: MediaLoader, images: OpenCLIPImageProcessor
) -> list[MediumSize]:
    """Return the size of each medium of a prompt, in reading order. No pixel is decoded.

    Args:
        parts: the prompt.
        loader: finds the files of clips, and of pictures where these are cut into tiles.
        images: cuts pictures.

    Raises:
        PromptError: for settings of a clip that cannot be read.
        MediaError: if a file cannot be found or read, is damaged, or is a picture too thin to be cut.
    """

    def measure(medium: Medium) -> MediumSize:
        if medium.kind == "video":
            return MediumSize(loader.count_frames(medium.source))
        return images.measure(*loader.measure(medium.source)) if images.cuts else MediumSize()

    return [measure(part) for part in parts if isinstance(part, Medium)]
