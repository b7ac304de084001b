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
from vlm_cli.modeling.deduplicate import deduplicate
from vlm_cli.modeling.encoders.views import pad_views
from vlm_cli.modeling.media_layout import MediaLayout
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
        vision_x: float[B, T_img, F, C, H, W]; F may be left out where it is 1, and so may T_img and F.
        vision_mask: bool[B, T_img, F], true for views that are not padding; None for all.
        vision_grid: int[B, T_img, 4], the tiles of each medium and its size in pixels; None for media without tiles.
        independently: whether the tokenizer encodes each medium independently of the others in its row.
        arrangement: puts the tokens of a picture's tiles in order; None leaves them view after view.
        bands: groups the patches of a picture's tiles before the tokenizer reads them; None leaves them tile by tile.
        layout: which views are encoded; None to find it here.

    Returns:
        float[B, T_img, n, d] tokens, and bool[B, T_img, n], true for tokens that are not padding.

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
    vision_x = vision_x.to(next(encoder.parameters()).dtype)
    frame_mask = None if vision_mask is None else vision_mask.bool()
    if encoder.num_views is not None:
        vision_x, frame_mask = pad_views(vision_x, frame_mask, encoder.num_views)
    bands = None if vision_grid is None else bands
    # A tracer cannot follow shapes that depend on values.
    if vision_x.is_meta or (torch.compiler.is_compiling() and bands is None):
        tokens = tokenizer(encoder(vision_x, frame_mask, vision_grid), frame_mask)
    elif frame_mask is not None and encoder.num_views is not None:
        tokens = tokenizer(_encode_pictures_once(encoder, vision_x, frame_mask, vision_grid), frame_mask)
    else:
        layout = layout or MediaLayout.of(vision_x, frame_mask)
        views = vision_x.flatten(0, 2)[layout.views]  # [views, C, H, W]
        features = encoder(views[:, None, None]).flatten(0, 2)  # [views, v, d]
        tokens = _make_all_tokens(tokenizer, features, layout, independently, arrangement, bands, vision_grid)
    if frame_mask is None:
        frame_mask = vision_x.new_ones(vision_x.shape[:3], dtype=torch.bool)
    return _arranged(tokenizer, tokens, frame_mask, vision_grid, arrangement)


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
    features = features.flatten(0, 2)[layout.views].to(next(tokenizer.parameters()).dtype)
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
    is_clip = arrangement.find_clips(layout.number, vision_grid)
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
            number, medium = number.flatten(0, 1).unique(dim=0, return_inverse=True)  # [media, F + 4], [B·T_img]
    elif independently:
        number, medium = layout.media, layout.medium
    if independently:
        number = number[:, None]  # each medium is a row of its own
    number, grid = number[..., :num_frames], number[..., num_frames:]
    mask = number >= 0
    features = torch.where(mask[..., None, None], features[number.clamp(min=0)], 0)  # [rows, media, F, v, d]
    if grouping is None:
        tokens = tokenizer(features, mask if layout.has_padding else None)  # [rows, media, n, d]
    else:
        features, patch_mask = grouping[0](features, grid)
        tokens = tokenizer(features, mask if layout.has_padding else None, patch_mask)
    return tokens if medium is None else tokens[medium, 0].unflatten(0, shape)


def _encode_pictures_once(
    encoder: VisionEncoder, vision_x: Tensor, frame_mask: Tensor, vision_grid: Tensor | None
) -> Tensor:
    """Encode equal media once, and media that are padding never, with an encoder that reads their views together.

    float[B, T_img, F, C, H, W], bool[B, T_img, F], int[B, T_img, 4] -> float[B, T_img, F, v, d].
    """
    there = frame_mask.any(-1)  # [B, T_img]
    there = there if there.any() else ~there
    grid = frame_mask.new_zeros(*there.shape, 4, dtype=torch.long) if vision_grid is None else vision_grid
    # Pictures with the same pixels may differ in their tiles; whole numbers below 256 are exact in every dtype.
    facts = torch.cat([frame_mask[there], grid[there][:, :2]], dim=-1).to(vision_x)  # [media, F + 2]
    keys, inverse = deduplicate(torch.cat([vision_x[there].flatten(1), facts], dim=1))
    views, facts = keys.split([keys.shape[1] - facts.shape[1], facts.shape[1]], dim=1)
    views = views.unflatten(1, vision_x.shape[2:])[:, None]  # [media, 1, F, C, H, W]
    mask, rows_columns = facts[:, :-2].bool(), facts[:, -2:].long()
    features = encoder(views, mask[:, None], nnf.pad(rows_columns, (0, 2))[:, None])[:, 0]  # [media, F, v, d]
    found = features.new_zeros(*there.shape, *features.shape[1:])
    found[there] = features[inverse]
    return found
