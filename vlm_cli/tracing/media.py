"""The media of a traced prompt: their pixels and vision tokens, and where in their pictures each token comes from.

A rows of shares, T_img media, F views of a medium, v features of a view, n vision tokens per medium, d channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_cli.media import LoadedClip, LoadedImage, short_name
from vlm_cli.modeling.batching import MediumPixels, stack_grids, stack_media
from vlm_cli.modeling.vision_tokenizers.c_abstractor import CAbstractor
from vlm_cli.modeling.vision_tokenizers.linear import LinearProjection
from vlm_cli.tracing.geometry import locate_frame, locate_views, patch_grid
from vlm_cli.tracing.origins import arranged_before, find_origins, grouped_before, pull_back
from vlm_cli.tracing.trace import TracedPicture

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor
    from vlm_cli.tiling import MediumSize
    from vlm_cli.tracing.origins import Origin

__all__ = ["TracedMedia", "read_media"]


@dataclass(frozen=True)
class TracedMedia:
    """The media of one prompt.

    Attributes:
        model: the VLM.
        loaded: the media, in reading order.
        pixels: of each medium.
        pictures: that the media show, frame after frame.
        tokens: float[1, T_img, n, d], the vision tokens.
        mask: bool[1, T_img, n], true for those that are not padding.
        grid: int[1, T_img, 4], as for `VLM.encode_vision`; None for media without tiles.
        origins: for each medium, from which features its tokens come.
    """

    model: VLM
    loaded: Sequence[LoadedImage | LoadedClip]
    pixels: Sequence[MediumPixels]
    pictures: tuple[TracedPicture, ...]
    tokens: Tensor
    mask: Tensor
    grid: Tensor | None
    origins: Sequence[Origin]

    def views_of(self, medium: int) -> list[int]:
        """Return the number of the picture that each view of a medium shows; media count from 0, and so do pictures."""
        shown = [i for i, picture in enumerate(self.pictures) if picture.medium == medium + 1]
        return shown if self.pictures[shown[0]].frame is not None else shown * len(self.pixels[medium].views)

    def features_of(self, shares: Tensor) -> list[list[Tensor]]:
        """Bring shares of vision tokens back to the features of views.

        Args:
            shares: float[A, T_img·n], of all vision tokens of the prompt.

        Returns:
            For each picture and each of its views, float[A, v].
        """
        found: list[list[Tensor]] = [[] for _ in self.pictures]
        by_medium = shares.unflatten(1, tuple(self.mask.shape[1:]))
        for medium, origin in enumerate(self.origins):
            own = by_medium[:, medium][:, self.mask[0, medium].cpu()]
            for picture, view in zip(self.views_of(medium), origin(own).unbind(1), strict=True):
                found[picture].append(view)
        return found

    def picture_shares(self, shares: Tensor) -> Tensor:
        """Add up shares of vision tokens, float[A, T_img·n], for each picture: float[A, pictures]."""
        views = self.features_of(shares)
        return torch.stack([torch.stack([x.sum(-1) for x in own]).sum(0) for own in views], dim=-1)


def read_media(model: VLM, processor: VLMProcessor, loaded: Sequence[LoadedImage | LoadedClip]) -> TracedMedia:
    """Encode the media of a prompt, and find out where their vision tokens come from.

    Args:
        model: the VLM.
        processor: of the model.
        loaded: the media as the model reads them, at least one.

    Raises:
        MediaError: if a picture is too thin to be cut.
    """
    pixels = [processor.image_processor.read(medium) for medium in loaded]
    views, mask = stack_media([[x.views for x in pixels]])
    views, mask = views.to(model.device), mask.to(model.device)
    found = stack_grids([[x.size for x in pixels]]).get("vision_grid")
    grid = None if found is None else found.to(model.device)
    tokens, token_mask = model.encode_vision(views, mask, grid)
    pictures = [
        picture
        for number, medium in enumerate(loaded, 1)
        for picture in _list_pictures(model, processor, medium, number)
    ]
    origins = _find_all_origins(model, pixels, mask)
    return TracedMedia(model, loaded, pixels, tuple(pictures), tokens, token_mask, grid, origins)


def _list_pictures(
    model: VLM, processor: VLMProcessor, medium: LoadedImage | LoadedClip, number: int
) -> list[TracedPicture]:
    name, size, patches = short_name(medium.source), (medium.width, medium.height), patch_grid(model)
    if isinstance(medium, LoadedImage):
        views = tuple(locate_views(processor.image_processor, *size, patches))
        return [TracedPicture(name, number, None, None, *size, views, medium.image)]
    seconds = medium.chosen.seconds or [None] * len(medium.frames)
    return [
        TracedPicture(
            name,
            number,
            i,
            second,
            *frame.size,
            tuple(locate_frame(processor.image_processor, *frame.size, patches)),
            frame,
        )
        for i, (frame, second) in enumerate(zip(medium.frames, seconds, strict=True), 1)
    ]


# -- origins -----------------------------------------------------------------------------------------------------------


def _find_all_origins(model: VLM, pixels: Sequence[MediumPixels], mask: Tensor) -> list[Origin]:
    """Say for each medium from which features of its views the vision tokens come, as the fusion gets them."""
    tokenizer, arrangement, bands = model.vision_tokenizer, model.arrangement, model.bands
    features = _find_features(model, pixels)  # [1, T_img, F, v, d]
    patch_mask, grouped = None, features
    if bands is not None and any(x.size.rows for x in pixels):
        grids = torch.tensor([[x.size.grid for x in pixels]])
        grouped, patch_mask = bands(features, grids)
    found = find_origins(tokenizer, grouped, mask, patch_mask)
    if arrangement is None:
        return [_through_bands(model, origin, x.size) for origin, x in zip(found, pixels, strict=True)]
    if arrangement.pools_patches:
        pooled = find_origins(tokenizer, arrangement.pool(features), mask)
        found = [
            own if x.size.rows else _through_pool(model, of_pool)
            for own, of_pool, x in zip(found, pooled, pixels, strict=True)
        ]
    return [_through_arrangement(model, origin, x.size) for origin, x in zip(found, pixels, strict=True)]


def _find_features(model: VLM, pixels: Sequence[MediumPixels]) -> Tensor:
    """Return what the tokenizer reads of each view, float[1, T_img, F, v, d]; of one that merges neighbours, zeros."""
    if isinstance(model.vision_tokenizer, (LinearProjection, CAbstractor)):
        most = max(len(x.views) for x in pixels)
        return torch.zeros(1, len(pixels), most, model.config.vision_config["num_patches"], 1)
    dtype = next(model.vision_encoder.parameters()).dtype
    found = []
    for x in pixels:
        views = x.views[None, None].to(model.device, dtype)
        grid = torch.tensor([[x.size.grid]], device=model.device)
        found.append(model.vision_encoder(views, None, grid)[0, 0])  # [F, v, d]
    return stack_media([found])[0]


def _through_arrangement(model: VLM, origin: Origin, size: MediumSize) -> Origin:
    arrangement = model.arrangement
    assert arrangement is not None
    is_pooled = arrangement.pools_patches and not size.rows
    per_view = arrangement.per_frame if is_pooled else arrangement.grid[0] * arrangement.grid[1]
    return lambda shares: origin(arranged_before(arrangement, size, size.num_frames * per_view, shares))


def _through_pool(model: VLM, origin: Origin) -> Origin:
    """Go back through the pooling of the patches of a clip's frames."""
    arrangement, num_patches = model.arrangement, model.config.vision_config["num_patches"]
    assert arrangement is not None

    def through(shares: Tensor) -> Tensor:
        by_view = origin(shares)  # [A, F, patches of the pooled grid]
        flat = pull_back(lambda x: arrangement.pool(x[None])[0], num_patches, by_view.flatten(0, 1))
        return flat.unflatten(0, by_view.shape[:2])

    return through


def _through_bands(model: VLM, origin: Origin, size: MediumSize) -> Origin:
    bands = model.bands
    if bands is None or not size.rows:
        return origin
    return lambda shares: grouped_before(bands, size, origin(shares))
