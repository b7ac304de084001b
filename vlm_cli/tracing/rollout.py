"""Attention rollout: what a position has of each source after several layers of attention and residual connections.

Source: Quantifying Attention Flow in Transformers (https://arxiv.org/abs/2005.00928, section 3): a layer's output is
half its input and half what it attends to. A gated block adds tanh(gate)·attention to its input, which so counts 1
against |tanh(gate)|; a closed gate lets nothing through.

A rows of an answer, T positions of text, S vision tokens of all media, n latents, P features that latents read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "Layer", "normalised", "num_positions", "roll_out", "roll_out_latents", "roll_out_queries"]


@dataclass(frozen=True)
class Block:
    """A gated block that reads media.

    Attributes:
        weights: float[T, S], attention of each position to the vision tokens; zero where a position reads nothing.
        opening: mean |tanh(gate)|, from 0 to 1.
    """

    weights: Tensor
    opening: float


@dataclass(frozen=True)
class Layer:
    """A decoder layer, and the gated block before it.

    Attributes:
        weights: float[T, T], attention averaged over heads; None if the layer computes none.
        block: None if no block stands before the layer.
    """

    weights: Tensor | None
    block: Block | None = None


def roll_out(layers: Sequence[Layer], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Follow what some positions have in the end back to the embeddings of text and to vision tokens.

    Args:
        layers: in order; layers without attention hand everything on.
        rows: the positions, A of T.

    Returns:
        float[A, T], the shares of the positions' embeddings, and float[A, S], those of the vision tokens that blocks
        read. Each row of both together sums to 1. Without blocks, S is 0.
    """
    length = num_positions(layers)
    num_media = next((layer.block.weights.shape[1] for layer in layers if layer.block is not None), 0)
    text = torch.zeros(len(rows), length)
    text[torch.arange(len(rows)), torch.tensor(rows, dtype=torch.long)] = 1
    media = torch.zeros(len(rows), num_media)
    for layer in reversed(layers):
        if layer.weights is not None:
            text = (text + text @ normalised(layer.weights)) / 2
        if layer.block is not None:
            seen = layer.block.weights.sum(-1) * layer.block.opening  # [T], against 1 for what the position had
            passed = text / (1 + seen)
            media = media + layer.block.opening * passed @ layer.block.weights
            text = passed
    return text, media


def num_positions(layers: Sequence[Layer]) -> int:
    """Count the positions, T, at which the layers attend; at least one layer or block must."""
    shapes = [len(layer.weights) for layer in layers if layer.weights is not None]
    shapes += [len(layer.block.weights) for layer in layers if layer.block is not None]
    return shapes[0]


def roll_out_latents(layers: Sequence[Tensor], num_read: int) -> Tensor:
    """Follow latents, which attend to P features and to themselves in each layer, back to the features.

    Args:
        layers: float[*, n, P + n] of each layer.
        num_read: P.

    Returns:
        float[*, n, P], rows that sum to 1: what was learned and not read is left out.
    """
    seen = torch.zeros_like(layers[0][..., :num_read])
    for weights in layers:
        seen = (seen + weights[..., :num_read] + weights[..., num_read:] @ seen) / 2
    return normalised(seen)


def roll_out_queries(layers: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Follow queries, which attend to themselves and in some layers to P features, back to the features.

    Args:
        layers: float[*, n, n] and float[*, n, P] of each layer, the latter None where queries read no features.

    Returns:
        float[*, n, P], rows that sum to 1.
    """
    read = next(x for _, x in layers if x is not None)
    seen = torch.zeros_like(read)
    for own, features in layers:
        seen = (seen + own @ seen) / 2
        if features is not None:
            seen = (seen + features) / 2
    return normalised(seen)


def normalised(weights: Tensor) -> Tensor:
    """Make each row sum to 1; a row of zeros stays. Attention to a learned sink is left out so."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=1e-20), 0)
