"""From which features of its medium each vision token comes, and so where what attends to a token looks.

`TokenOrigins` knows it for the tokens that a vision tokenizer makes: by its attention, or by the neighbours that it
merges. `arranged_before` and `grouped_before` go back through what stands behind and before the tokenizer for tiles.

A rows of shares, T_img media, F views of a medium, v features of a view, n tokens, N media or views that are read
apart, d channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from vlm_cli.modeling.arrangement import Arrangement
from vlm_cli.modeling.bands import Bands
from vlm_cli.modeling.vision_tokenizers.c_abstractor import CAbstractor
from vlm_cli.modeling.vision_tokenizers.grid import pixel_shuffle, pool
from vlm_cli.modeling.vision_tokenizers.latent_attention import LatentAttention
from vlm_cli.modeling.vision_tokenizers.linear import LinearProjection
from vlm_cli.modeling.vision_tokenizers.perceiver import PerceiverResampler
from vlm_cli.modeling.vision_tokenizers.qformer import QFormer
from vlm_cli.tiling import MediumSize
from vlm_cli.tracing.recording import record_attention
from vlm_cli.tracing.rollout import normalised, roll_out_latents, roll_out_queries

__all__ = ["arranged_before", "find_origins", "grouped_before", "is_known", "pull_back"]

#: Brings float[A, n] shares of a medium's tokens to float[A, F, v] shares of its features, both without padding.
Origin = Callable[[Tensor], Tensor]

_ATTENDING = (PerceiverResampler, QFormer, LatentAttention)
_TOGETHER = 32  # media at once, of which one feature is left out


def is_known(tokenizer: Any) -> bool:
    """Tell whether the attention of a vision tokenizer, or the neighbours that it merges, are known."""
    return isinstance(tokenizer, (*_ATTENDING, LinearProjection, CAbstractor))


def find_origins(
    tokenizer: Any, features: Tensor, frame_mask: Tensor, patch_mask: Tensor | None = None
) -> list[Origin]:
    """Say for each medium of a row from which features its vision tokens come.

    Args:
        tokenizer: any vision tokenizer.
        features: float[1, T_img, F, v, d].
        frame_mask: bool[1, T_img, F], true for views that are not padding.
        patch_mask: bool[1, T_img, F, v], true for patches that are read; None for all.
    """
    F, v = features.shape[2:4]
    counts = frame_mask[0].sum(-1).tolist()  # views of each medium; padding stands last
    if isinstance(tokenizer, LinearProjection):
        return [_of_neighbours(tokenizer, v, count) for count in counts]
    if isinstance(tokenizer, CAbstractor):
        return [_of_frames(lambda x: _mix(tokenizer, x), v, tokenizer.num_tokens()) for _ in counts]
    if not isinstance(tokenizer, _ATTENDING):
        return [_by_influence(tokenizer, features[:, t, :count]) for t, count in enumerate(counts)]
    read = v if tokenizer.frames == "apart" else F * v
    seen = _record(tokenizer, features, frame_mask, patch_mask, read)  # [N, n, read]
    seen = seen.unflatten(0, (features.shape[1], -1))  # [T_img, F or 1, n, read]
    return [_of_attention(x, count, v) for x, count in zip(seen, counts, strict=True)]


# -- tokenizers that attend --------------------------------------------------------------------------------------------


def _record(
    tokenizer: PerceiverResampler | QFormer | LatentAttention,
    features: Tensor,
    frame_mask: Tensor,
    patch_mask: Tensor | None,
    read: int,
) -> Tensor:
    """Return the share of each feature in each token: float[N, n, read], rows that sum to 1."""
    arguments = (features, frame_mask) if patch_mask is None else (features, frame_mask, patch_mask)
    if isinstance(tokenizer, QFormer):
        layers: list[Any] = list(tokenizer.qformer.encoder.layer)
        parts = {("own", i): layer.attention for i, layer in enumerate(layers)}
        parts |= {("read", i): layer.crossattention for i, layer in enumerate(layers) if layer.has_cross_attention}
        with record_attention(parts) as found:
            tokenizer(*arguments)
        weights = {key: x[0] for key, x in found.weights.items()}
        return roll_out_queries([(weights["own", i], weights.get(("read", i))) for i in range(len(layers))])
    if isinstance(tokenizer, LatentAttention):
        with record_attention({0: tokenizer.x_attn}) as found:
            tokenizer(*arguments)
        return normalised(found.weights[0][0][..., :read])  # no residual connection: tokens are what they attend to
    blocks: list[Any] = list(tokenizer.layers)
    with record_attention({i: block[0] for i, block in enumerate(blocks)}) as found:
        tokenizer(*arguments)
    return roll_out_latents([found.weights[i][0] for i in range(len(blocks))], read)


def _of_attention(seen: Tensor, num_views: int, num_features: int) -> Origin:
    """Bring shares back by float[F, n, v], each view read apart, or by float[1, n, F·v]."""
    is_apart = seen.shape[2] == num_features

    def origin(shares: Tensor) -> Tensor:
        if is_apart:
            return torch.einsum("afn,fnv->afv", shares.unflatten(1, (num_views, -1)), seen[:num_views])
        return (shares @ seen[0]).unflatten(1, (-1, num_features))[:, :num_views]

    return origin


# -- tokenizers that map and merge -------------------------------------------------------------------------------------


def _of_frames(merge: Callable[[Tensor], Tensor], num_features: int, num_tokens: int) -> Origin:
    """Bring shares back, view by view, through what merges the features of one: float[v, d] -> float[n, d]."""

    def origin(shares: Tensor) -> Tensor:
        by_view = shares.unflatten(1, (-1, num_tokens)).flatten(0, 1)  # [A·F, n]
        return pull_back(merge, num_features, by_view).unflatten(0, (len(shares), -1))

    return origin


def _of_neighbours(tokenizer: LinearProjection, num_features: int, num_frames: int) -> Origin:
    num_tokens = len(_merge(tokenizer, torch.zeros(num_features, 1)))  # fewer if an arrangement pools patches first
    found = _of_frames(lambda x: _merge(tokenizer, x), num_features, num_tokens)
    if tokenizer.frames == "concatenate":
        return found
    return lambda shares: found(shares).expand(-1, num_frames, -1) / num_frames


def _merge(tokenizer: LinearProjection, x: Tensor) -> Tensor:
    """Average the features that the tokenizer merges into each token: float[v, d] -> float[n, d]."""
    options, grid = tokenizer.options, tokenizer.grid
    if (s := options.pixel_shuffle) > 1:
        squares = pixel_shuffle(x, s, grid)  # in this order, the channels of one patch follow each other
        x = squares.unflatten(-1, (s * s, -1)).mean(-2)
    elif options.convolutions:
        assert grid is not None
        image = x.T.unflatten(1, grid)
        for _ in range(len(tokenizer.convolutions)):
            image = nnf.avg_pool2d(image, 3, stride=2, padding=1)
        x = image.flatten(1).T
    elif options.pool > 1 and options.pool_at == "before":
        assert grid is not None
        x = pool(x[None], options.pool, grid, options.pool_by)[0]
    if options.pool > 1 and options.pool_at == "after":
        assert tokenizer.mapped_grid is not None
        x = pool(x[None], options.pool, tokenizer.mapped_grid, options.pool_by)[0]
    return x


def _mix(tokenizer: CAbstractor, x: Tensor) -> Tensor:
    """Average as far as the C-abstractor's convolutions and its pooling reach: float[v, d] -> float[n, d]."""

    def stage(image: Tensor, blocks: Any) -> Tensor:
        for _ in blocks.children():  # each adds a convolution of 3×3 neighbours to what it gets
            image = (image + nnf.avg_pool2d(image, 3, stride=1, padding=1)) / 2
        return image

    before, pooling, after = tokenizer.net
    return stage(pooling(stage(x.T.unflatten(1, tokenizer.grid), before)), after).flatten(1).T


# -- any tokenizer -----------------------------------------------------------------------------------------------------


def _by_influence(tokenizer: Any, features: Tensor) -> Origin:
    """Bring shares back by how far each token moves when a feature becomes the mean of all.

    Args:
        tokenizer: any vision tokenizer.
        features: float[1, F, v, d] of one medium, without padding.
    """
    _, F, v, d = features.shape
    flat = features.reshape(1, F * v, d)
    whole = tokenizer(features[None])[0, 0].float()  # [n, d_out]
    moved = []
    for chunk in torch.arange(F * v, device=features.device).split(_TOGETHER):
        without = flat.repeat(len(chunk), 1, 1)
        without[torch.arange(len(chunk)), chunk] = flat.mean(1)
        tokens = tokenizer(without.unflatten(1, (F, v))[:, None])[:, 0].float()  # [chunk, n, d_out]
        moved.append((tokens - whole).norm(dim=-1))
    seen = normalised(torch.cat(moved).T.cpu())  # [n, F·v]
    return lambda shares: (shares @ seen).unflatten(1, (F, v))


# -- around the tokenizer ----------------------------------------------------------------------------------------------


def arranged_before(arrangement: Arrangement, size: MediumSize, num_tokens: int, shares: Tensor) -> Tensor:
    """Bring shares of arranged tokens back to the tokens of the views: float[A, n'] -> float[A, n].

    The share of a newline comes from no view, and is left out.
    """
    like = Arrangement(arrangement.options, arrangement.grid, len(shares))
    if like.newline is not None:
        nn.init.zeros_(like.newline)
    return pull_back(lambda tokens: like.arrange(tokens, size), num_tokens, shares)


def grouped_before(bands: Bands, size: MediumSize, shares: Tensor) -> Tensor:
    """Bring shares of patches in the groups of a vision tokenizer back to the views: float[A, F, v] -> the same."""
    start = int(bands.options.thumbnail == "first")
    tiles = slice(start, start + size.rows * size.columns)
    num, v = size.rows * size.columns, shares.shape[-1]

    def group(features: Tensor) -> Tensor:
        return bands.group(features.unflatten(0, (num, v)), size)[0].flatten(0, 1)

    found = shares.clone()
    found[:, tiles] = pull_back(group, num * v, shares[:, tiles].flatten(1)).unflatten(1, (num, v))
    return found


def pull_back(average: Callable[[Tensor], Tensor], num_inputs: int, shares: Tensor) -> Tensor:
    """Bring shares of outputs back to the inputs that they average: float[A, outputs] -> float[A, inputs].

    Args:
        average: a linear map float[inputs, A] -> float[outputs, A], channel by channel, with weights that are not
            negative. Its weights for an output need not sum to 1.
        num_inputs: inputs of it.
        shares: of the outputs. That of an output without inputs is left out.
    """
    with torch.inference_mode(False), torch.enable_grad():
        inputs = torch.zeros(num_inputs, len(shares), requires_grad=True)
        total = average(torch.ones(num_inputs, len(shares))).detach()  # [outputs, A]
        scaled = torch.where(total > 0, shares.clone().T / total.clamp(min=1e-20), 0)
        (found,) = torch.autograd.grad(average(inputs), inputs, scaled)
    return found.T
