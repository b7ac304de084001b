"""Layers that vision tokenizers and fusions share."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm_cli.composition import Activation, MapActivation

__all__ = ["feed_forward", "linear_maps", "make_norm"]


class SquaredReLU(nn.Module):
    """Compute max(x, 0)² (Primer, https://arxiv.org/abs/2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class QuickGELU(nn.Module):
    """Compute x·σ(1.702 x), OpenAI CLIP's GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SwiGLU(nn.Module):
    """Multiply the first half of the channels by the SiLU of the second (https://arxiv.org/abs/2002.05202).

    Transformers' Aya Vision and Cohere2 Vision have the halves in this order.
    """

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * value


class GemmaRMSNorm(nn.Module):
    """Gemma's RMSNorm: the factor of a channel is 1 + weight, and the arithmetic is float32.

    Args:
        dim: channels.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Start as an RMSNorm whose factors are 1."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "squared_relu": SquaredReLU,
    "silu": nn.SiLU,
    "quick_gelu": QuickGELU,
    "swiglu": SwiGLU,
}


def make_norm(kind: Literal["layer", "rms", "gemma"] | None, dim: int, eps: float) -> nn.Module:
    """Build the norm of a name over `dim` channels; None gives the identity."""
    if kind is None:
        return nn.Identity()
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "gemma": GemmaRMSNorm}[kind](dim, eps=eps)


def linear_maps(
    dims: list[int],
    activation: MapActivation,
    *,
    bias: bool = True,
    norm: Literal["layer"] | None = None,
    norm_eps: float = 1e-5,
) -> nn.Sequential:
    """Build linear maps with an activation between each two.

    Args:
        dims: channels in, after each map, and out. With `swiglu`, a map before an activation gives twice as many, and
            the activation halves them.
        activation: between two maps.
        bias: whether the maps have biases.
        norm: of the channels before each activation; None for none.
        norm_eps: of the norm.
    """
    layers: list[Any] = []
    last = len(dims) - 2
    for i, (dim_in, dim_out) in enumerate(pairwise(dims)):
        halved = activation == "swiglu" and i < last
        layers.append(nn.Linear(dim_in, 2 * dim_out if halved else dim_out, bias=bias))
        if i < last and norm is not None:
            layers.append(make_norm(norm, layers[-1].out_features, norm_eps))
        if i < last and activation == "softmax":
            layers.append(nn.Softmax(-1))
        elif i < last:
            layers.append(nn.GELU("tanh") if activation == "gelu_tanh" else _ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


def feed_forward(dim: int, mult: int, activation: Activation = "gelu") -> nn.Sequential:
    """Build LayerNorm, linear, activation, linear, without biases.

    Args:
        dim: channels in and out.
        mult: hidden channels over `dim`.
        activation: between the linear layers.
    """
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        _ACTIVATIONS[activation](),
        nn.Linear(dim * mult, dim, bias=False),
    )
