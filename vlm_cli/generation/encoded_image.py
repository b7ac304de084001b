"""One image or clip on its way through the vision encoder.

F frames, C H W pixels, n vision tokens of d channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlm_cli.errors import MediaError
from vlm_cli.tiling import MediumSize

__all__ = ["EncodedImage", "ImageSlot"]


@dataclass(eq=False)
class EncodedImage:
    """An image or a clip: pixels until the vision encoder has read it, and vision tokens afterwards.

    Attributes:
        pixels: float[F, C, H, W], preprocessed; None once `tokens` are known.
        size: of the medium.
        tokens: float[n, d], the vision tokens.
        mask: bool[n], which of them are valid.
    """

    pixels: Tensor | None
    size: MediumSize
    tokens: Tensor | None = None
    mask: Tensor | None = None


@dataclass(eq=False)
class ImageSlot:
    """The place of one source; every row that shows the source holds the same slot.

    A worker process decodes the source. Then the slot holds the image or the clip, or the reason why it cannot be read.
    """

    image: EncodedImage | None = None
    error: MediaError | None = None
