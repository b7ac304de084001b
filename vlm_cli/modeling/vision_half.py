"""`VisionHalf`: the half of a VLM that makes vision tokens of pixels, and counts them before there are pixels.

B rows, T_img media per row, F views per medium (frames of a clip, or tiles of a picture), C H W pixels, v patches, n
vision tokens per medium, d channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm_cli.modeling.announcement import Announcement
from vlm_cli.modeling.arrangement import Arrangement
from vlm_cli.modeling.bands import Bands
from vlm_cli.modeling.deduplicate import moved
from vlm_cli.modeling.media_layout import MediaLayout
from vlm_cli.modeling.renamed import encodes_media_independently
from vlm_cli.modeling.vision import encode_features, encode_media
from vlm_cli.modeling.vision_encoder import VisionEncoder
from vlm_cli.tiling import MediumSize

__all__ = ["VisionHalf"]


class VisionHalf:
    """The vision encoder and the vision tokenizer, with what stands between and after them for tiles."""

    # Attributes of the `VLM` that inherits this class, and what its fusion says of a medium.
    vision_encoder: VisionEncoder
    vision_tokenizer: Any
    bands: Bands | None
    announcement: Announcement | None
    splices_media: bool
    num_positions: Callable[[int], int]
    project_media: Callable[[Tensor, Tensor], Tensor]

    @property
    def arrangement(self) -> Arrangement | None:
        """What puts the vision tokens of a picture's tiles in order; None leaves them view after view."""
        found: Arrangement | None = getattr(self.vision_tokenizer, "arrangement", None)
        return found

    def num_vision_tokens(self, size: MediumSize) -> int:
        """Count the vision tokens of a medium."""
        if self.arrangement is not None:
            return self.arrangement.num_tokens(size)
        return self.vision_tokenizer.num_tokens(size.num_frames)

    def positions_of(self, size: MediumSize) -> int:
        """Count the positions of the language model that a medium takes, those of the text around its views included.

        `num_positions` is what the fusion says of a medium whose views follow each other.
        """
        if self.announcement is not None:
            return len(self.announcement.ids(size))
        if self.splices_media and self.arrangement is not None:
            return self.arrangement.num_tokens(size)
        return self.num_positions(size.num_frames)

    @property
    def encodes_media_independently(self) -> bool:
        """Whether the vision tokens of a medium depend on nothing else in its row, so that they can be kept."""
        return encodes_media_independently(self.vision_tokenizer)

    def encode_vision(
        self,
        vision_x: Tensor,
        vision_mask: Tensor | None = None,
        vision_grid: Tensor | None = None,
        media_layout: MediaLayout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the vision tokens of media.

        Args:
            vision_x: float[B, T_img, F, C, H, W]; F may be left out where it is 1, and so may T_img and F. The F views
                of a medium are the frames of a clip, or the tiles of a picture.
            vision_mask: bool[B, T_img, F], true for views that are not padding; None for no padding.
            vision_grid: int[B, T_img, 4], the rows and columns of tiles of each picture, and the height and width in
                pixels that it was given with; zeros for a medium without tiles. None for media without tiles.
                All three may be on the CPU while the model is on an accelerator: what depends on their numbers is then
                decided before they move, and nothing waits for the accelerator.
            media_layout: what `MediaLayout.of` says of these media; None to find it here.

        Returns:
            float[B, T_img, n, d] tokens, and bool[B, T_img, n], true for tokens that are not padding. The mask is where
            `vision_mask` is, or without one where the tokens are.

        Raises:
            ValueError: if there are no media, or if `vision_x`, `vision_mask` or `vision_grid` has another shape.
        """
        tokens, mask = encode_media(
            self.vision_encoder,
            self.vision_tokenizer,
            vision_x,
            vision_mask,
            vision_grid,
            independently=self.encodes_media_independently,
            arrangement=self.arrangement,
            bands=self.bands,
            layout=media_layout,
        )
        return tokens, moved(mask, tokens.device) if vision_mask is None else mask

    def encode_features(
        self,
        features: Tensor,
        vision_mask: Tensor | None = None,
        vision_grid: Tensor | None = None,
        media_layout: MediaLayout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the vision tokens of media from float[B, T_img, F, v, d], what the vision encoder gave for each view.

        The other arguments and the results are those of `encode_vision`. An encoder that reads the views of a medium
        together gives no features of a view.
        """
        return encode_features(
            self.vision_tokenizer,
            features,
            vision_mask,
            vision_grid,
            independently=self.encodes_media_independently,
            arrangement=self.arrangement,
            bands=self.bands,
            layout=media_layout,
        )

    def _resolve_media(
        self,
        vision_x: Tensor | None,
        vision_mask: Tensor | None,
        vision_grid: Tensor | None,
        tokens: Tensor | None,
        media_mask: Tensor | None,
        media_layout: MediaLayout | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the media as `project_media` does, and bool[B, T_img, n]; None and None without media.

        Raises:
            ValueError: for both pixels and tokens, or for a mask without tokens.
        """
        if vision_x is not None:
            if tokens is not None:
                raise ValueError("vision_x and vision_tokens are the same media. Give one of them.")
            known = {} if media_layout is None else {"media_layout": media_layout}
            tokens, media_mask = self.encode_vision(vision_x, vision_mask, vision_grid, **known)
        if tokens is None:
            if media_mask is not None:
                raise ValueError("media_mask is given without vision_tokens.")
            return None, None
        if media_mask is None:
            media_mask = torch.ones(tokens.shape[:3], dtype=torch.bool, device="meta" if tokens.is_meta else None)
        return self.project_media(tokens, media_mask), media_mask
