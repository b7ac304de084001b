"""From pixels to vision tokens: equal views and equal media are encoded once, padding is not encoded.

B batch, T_img media per row, F views per medium (frames of a clip, or tiles of a picture), C H W pixels, v patches, n
vision tokens per medium, d channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vlm_cli.errors import VisionEncoderError
from vlm_cli.modeling.arrangement import Arrangement
from vlm_cli.modeling.bands import Bands
from vlm_cli.modeling.deduplicate import find_equal, is_on_host, moved
from vlm_cli.modeling.encoders.views import pad_views
from vlm_cli.modeling.media_layout import MediaLayout, find_media
from vlm_cli.modeling.vision_encoder import VisionEncoder

__all__ = ["encode_features", "encode_media"]


def encode_media(
    encoder: VisionEncoder,
    tokenizer: Any,
    vision_x: Tensor,
    vision_mask: Tensor | None = None,
    vision_grid: Tensor | None = None,
    *,
    independently: bool,
    arrangement: Arrangement | None = None,
    bands: Bands | None = None,
    layout: MediaLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the vision tokens of media.

    Args:
        encoder: reads frames.
        tokenizer: the vision tokenizer; makes tokens of features.
        vision_x: float[B, T_img, F, C, H, W]; F may be left out where it is 1, and so may T_img and F. On the CPU,
            equal views are found before the pixels go to an accelerator.
        vision_mask: bool[B, T_img, F], true for views that are not padding; None for all. The mask and the grid may be
            on the CPU; from an accelerator, what depends on their numbers has to be waited for.
        vision_grid: int[B, T_img, 4], the tiles of each medium and its size in pixels; None for media without tiles.
        independently: whether the tokenizer encodes each medium independently of the others in its row.
        arrangement: puts the tokens of a picture's tiles in order; None leaves them view after view.
        bands: groups the patches of a picture's tiles before the tokenizer reads them; None leaves them tile by tile.
        layout: which views are encoded; None to find it here.

    Returns:
        float[B, T_img, n, d] tokens, and bool[B, T_img, n], true for tokens that are not padding; the mask is on the
        device of `vision_mask`, or on the CPU without one.

    Raises:
        ValueError: if there are no media, or if `vision_x`, `vision_mask` or `vision_grid` has another shape.
        VisionEncoderError: if the encoder does not give the number of patches that the configuration says.
    """
    if not vision_x.numel():
        raise ValueError("vision_x holds no media; leave vision_x out for prompts without media.")
    vision_x = _with_six_dimensions(vision_x, (encoder.num_channels, *encoder.image_size))
    if vision_mask is not None and vision_mask.shape != vision_x.shape[:3]:
        raise ValueError(
            f"vision_mask must be (B, T_img, F) = {tuple(vision_x.shape[:3])}, got {tuple(vision_mask.shape)}."
        )
    if vision_grid is not None and vision_grid.shape != (*vision_x.shape[:2], 4):
        raise ValueError(
            f"vision_grid must be (B, T_img, 4) = {(*vision_x.shape[:2], 4)}, got {tuple(vision_grid.shape)}."
        )
    weight = next(encoder.parameters())
    device = vision_x.device if weight.is_meta else weight.device  # accelerate may keep weights on a disk
    vision_x = vision_x.to(weight.dtype)
    frame_mask = None if vision_mask is None else vision_mask.bool()
    if encoder.num_views is not None:
        vision_x, frame_mask = pad_views(vision_x, frame_mask, encoder.num_views)
    bands = None if vision_grid is None else bands
    # A tracer cannot follow shapes that depend on values.
    if vision_x.is_meta or (torch.compiler.is_compiling() and bands is None):
        tokens = tokenizer(encoder(vision_x, frame_mask, vision_grid), frame_mask)
    elif frame_mask is not None and encoder.num_views is not None:
        features = _encode_pictures_once(encoder, vision_x, frame_mask, vision_grid, device)
        tokens = tokenizer(features, moved(frame_mask, device))
    else:
        layout = layout or MediaLayout.of(vision_x, frame_mask)
        views = moved(_choose(vision_x.flatten(0, 2), layout.views), device)  # [views, C, H, W]
        features = encoder(views[:, None, None]).flatten(0, 2)  # [views, v, d]
        tokens = _make_all_tokens(tokenizer, features, layout, independently, arrangement, bands, vision_grid)
    if frame_mask is None:
        frame_mask = torch.ones(vision_x.shape[:3], dtype=torch.bool, device="meta" if vision_x.is_meta else None)
    return _arranged(tokenizer, tokens, frame_mask, vision_grid, arrangement)


def _choose(tensors: Tensor, places: Tensor) -> Tensor:
    """Return some of the tensors, or all as they are: *[N, …], int[M] in rising order on any device -> *[M, …]."""
    return tensors if len(places) == len(tensors) else tensors[moved(places, tensors.device)]


def encode_features(
    tokenizer: Any,
    features: Tensor,
    vision_mask: Tensor | None = None,
    vision_grid: Tensor | None = None,
    *,
    independently: bool,
    arrangement: Arrangement | None = None,
    bands: Bands | None = None,
    layout: MediaLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the vision tokens of media whose features are known; arguments and results as for `encode_media`.

    Args:
        features: float[B, T_img, F, v, d], what the encoder gave for each view.
    """
    mask = torch.ones_like(features[..., 0, 0], dtype=torch.bool) if vision_mask is None else vision_mask.bool()
    layout = layout or MediaLayout.of(features, mask)
    bands = None if vision_grid is None else bands
    weight = next(tokenizer.parameters())
    tokenizer_device = features.device if weight.is_meta else weight.device
    features = moved(_choose(features.flatten(0, 2), layout.views), tokenizer_device).to(weight.dtype)
    tokens = _make_all_tokens(tokenizer, features, layout, independently, arrangement, bands, vision_grid)
    return _arranged(tokenizer, tokens, mask, vision_grid, arrangement)


def _make_all_tokens(
    tokenizer: Any,
    features: Tensor,
    layout: MediaLayout,
    independently: bool,
    arrangement: Arrangement | None,
    bands: Bands | None,
    vision_grid: Tensor | None,
) -> Tensor:
    """Make the vision tokens of pictures and of clips, whose patches an arrangement may pool."""
    grouping = None if bands is None or vision_grid is None else (bands, vision_grid)
    tokens = _make_tokens(tokenizer, features, layout, independently, grouping)
    if arrangement is None or not arrangement.pools_patches:
        return tokens
    is_clip = moved(arrangement.find_clips(layout.number, vision_grid), tokens.device)
    pooled = _make_tokens(tokenizer, arrangement.pool(features), layout, independently)
    pooled = nnf.pad(pooled, (0, 0, 0, tokens.shape[2] - pooled.shape[2]))
    return torch.where(is_clip[..., None, None], pooled, tokens)


def _arranged(
    tokenizer: Any, tokens: Tensor, frame_mask: Tensor, vision_grid: Tensor | None, arrangement: Arrangement | None
) -> tuple[Tensor, Tensor]:
    """Return the tokens in their order, and which of them are not padding.

    Raises:
        VisionEncoderError: if there are more or fewer than the configuration says.
    """
    mask = tokenizer.token_mask(frame_mask)
    if mask.shape[2] != tokens.shape[2]:
        raise VisionEncoderError(
            f"the vision tokenizer made {tokens.shape[2]} tokens, and {mask.shape[2]} were expected: the encoder does "
            "not give the num_patches of vision_config in config.json. Restore the file, or build the model again."
        )
    return (tokens, mask) if arrangement is None else arrangement(tokens, mask, vision_grid)


def _with_six_dimensions(vision_x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Insert the F and T_img that were left out.

    Raises:
        ValueError: for another number of dimensions, or another image size.
    """
    missing = 6 - vision_x.ndim
    if missing not in (0, 1, 2) or vision_x.shape[-3:] != shape:
        raise ValueError(f"vision_x must be (B, T_img, F, {', '.join(map(str, shape))}), got {tuple(vision_x.shape)}.")
    for _ in range(missing):
        vision_x = vision_x.unsqueeze(-4)
    return vision_x


def _make_tokens(
    tokenizer: Any,
    features: Tensor,
    layout: MediaLayout,
    independently: bool,
    grouping: tuple[Bands, Tensor] | None = None,
) -> Tensor:
    """Make the vision tokens of media, of equal media once if the tokenizer is independent.

    Args:
        tokenizer: the vision tokenizer.
        features: float[views, v, d] of the distinct views.
        layout: of the batch.
        independently: whether the tokenizer encodes each medium independently of the others in its row.
        grouping: what groups the patches of a picture by its tiles, and int[B, T_img, 4], these tiles; equal media also
            have equal tiles. None leaves the patches tile by tile.

    Returns:
        float[B, T_img, n, d].
    """
    number, medium = layout.number, None
    shape, num_frames = number.shape[:2], number.shape[-1]
    if grouping is not None:
        number = torch.cat([number, grouping[1].to(number)], dim=-1)  # [B, T_img, F + 4]
        if independently:
            number, medium = find_media(number)  # [media, F + 4], [B·T_img]
    elif independently:
        number, medium = layout.media, layout.medium
    if independently:
        number = number[:, None]  # each medium is a row of its own
    number, grid = number[..., :num_frames], number[..., num_frames:]
    number = moved(number, features.device)
    mask = number >= 0
    features = features[number.clamp(min=0)]  # [rows, media, F, v, d]
    if layout.has_padding:
        features = torch.where(mask[..., None, None], features, 0)
    if grouping is None:
        tokens = tokenizer(features, mask if layout.has_padding else None)  # [rows, media, n, d]
    else:
        features, patch_mask = grouping[0](features, grid)
        tokens = tokenizer(features, mask if layout.has_padding else None, patch_mask)
    if medium is None:
        return tokens
    return _choose_all(tokens[:, 0], medium).unflatten(0, shape)


def _choose_all(tensors: Tensor, places: Tensor) -> Tensor:
    """Return the tensor of each place: *[M, …], int[N] on any device -> *[N, …]. With M = N, places are in order."""
    return tensors if len(places) == len(tensors) else tensors[moved(places, tensors.device)]


def _encode_pictures_once(
    encoder: VisionEncoder, vision_x: Tensor, frame_mask: Tensor, vision_grid: Tensor | None, device: torch.device
) -> Tensor:
    """Encode equal media once, and media that are padding never, with an encoder that reads their views together.

    Where an accelerator holds the mask, padding is encoded too; its features are zero all the same.
    float[B, T_img, F, C, H, W], bool[B, T_img, F], int[B, T_img, 4] -> float[B, T_img, F, v, d].
    """
    shape, there = vision_x.shape[:2], frame_mask.any(-1).flatten()  # [B·T_img]
    views, mask = vision_x.flatten(0, 1), frame_mask.flatten(0, 1)
    grid = mask.new_zeros(len(mask), 4, dtype=torch.long) if vision_grid is None else vision_grid.flatten(0, 1)
    if not is_on_host(there):
        features = encoder(moved(views, device)[:, None], mask[:, None], moved(grid, device)[:, None])[:, 0]
        return torch.where((there | ~there.any())[:, None, None, None], features, 0).unflatten(0, shape)
    places = (there if there.any() else ~there).nonzero()[:, 0]  # [media]
    views, mask, grid = _choose(views, places), mask[places], grid[places.to(grid.device)]
    first, inverse = torch.arange(len(places)), torch.arange(len(places))
    if is_on_host(views) and is_on_host(grid):
        # Pictures with the same pixels may differ in their tiles; whole numbers below 256 are exact in every dtype.
        first, inverse = find_equal(
            torch.cat([views.flatten(1), torch.cat([mask, grid[:, :2]], dim=-1).to(views)], dim=1)
        )
    views, mask, grid = (moved(_choose(x, first), device)[:, None] for x in (views, mask, grid))  # [media, 1, …]
    features = encoder(views, mask, grid)[:, 0]  # [media, F, v, d]
    found = features.new_zeros(len(there), *features.shape[1:])
    return found.index_copy(0, moved(places, device), _choose_all(features, inverse)).unflatten(0, shape)
