"""The media of several rows as arguments of `generate`: each distinct image or clip passes the vision encoder once.

B rows of a batch, T_img media per row, F frames, C H W pixels, n vision tokens of d channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlm_cli.generation.encoded_image import EncodedImage
from vlm_cli.generation.rows import Row
from vlm_cli.modeling.batching import MediumPixels, stack_grids, stack_media, stack_pixels
from vlm_cli.tiling import MediumSize

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM

__all__ = ["BatchMedia", "count_token_bytes"]

FRAMES_PER_ENCODING = 16  # frames that the vision encoder reads at once; an image has one


class BatchMedia:
    """Encodes the media of rows for one model.

    Args:
        model: the VLM.

    Attributes:
        encodes_apart: whether the vision tokens of a medium are the same beside any other media.
        encoded: images that passed the vision encoder so far.
    """

    def __init__(self, model: VLM) -> None:
        self.model = model
        self.encodes_apart: bool = model.encodes_media_independently
        self.encoded = 0

    def arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the media as arguments of `generate`.

        They are vision tokens if the tokens of a medium are the same in every row, and pixels otherwise. Vision tokens
        are on the model's device, and all else is on the CPU.
        """
        images = [[slot.image for slot in row.images if slot.image is not None] for row in rows]
        distinct = list(dict.fromkeys(image for row in images for image in row))
        if not distinct:
            return {}
        if not self.encodes_apart:
            self.encoded += len(distinct)
            pixels = [[MediumPixels(x.pixels, x.size) for x in row if x.pixels is not None] for row in images]
            return stack_pixels(pixels)
        self._encode([image for image in distinct if image.tokens is None])
        tokens, mask = stack_media(
            [[image.tokens for image in row if image.tokens is not None] for row in images],
            [[image.mask for image in row if image.mask is not None] for row in images],
        )
        grid = stack_grids([[image.size for image in row] for row in images])
        return {"vision_tokens": tokens, "media_mask": mask, "media_keys": images, **grid}

    def _encode(self, images: Sequence[EncodedImage]) -> None:
        """Replace the pixels of images by vision tokens, which stay on the model's device."""
        for some in _of_one_length(images):
            pixels = torch.stack([x.pixels for x in some if x.pixels is not None])[:, None]  # [k, 1, F, C, H, W]
            grids: dict[str, Any] = stack_grids([[x.size] for x in some])
            there = torch.ones(pixels.shape[:3], dtype=torch.bool)
            tokens, mask = self.model.encode_vision(pixels, there, **grids)
            for image, x, m in zip(some, tokens, mask, strict=True):
                image.tokens, image.mask, image.pixels = x[0].clone(), m[0].clone(), None
            self.encoded += len(some)


def _of_one_length(images: Sequence[EncodedImage]) -> Iterator[list[EncodedImage]]:
    """Yield groups of images and clips with equally many frames, none with more frames than the encoder reads at once.

    A clip with more frames than that is a group of its own.
    """
    groups: dict[int, list[EncodedImage]] = {}
    for image in images:
        if image.pixels is not None:
            groups.setdefault(len(image.pixels), []).append(image)
    for frames, group in groups.items():
        step = max(1, FRAMES_PER_ENCODING // frames)
        yield from (group[i : i + step] for i in range(0, len(group), step))


def count_token_bytes(model: VLM, size: MediumSize) -> int:
    """Return the bytes of the vision tokens of one medium."""
    return model.num_vision_tokens(size) * model.vision_tokenizer.dim_out * model.dtype.itemsize
