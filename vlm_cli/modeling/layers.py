"""Layers that vision tokenizers and fusions share."""

from __future__ import annotations

from torch import Tensor, nn

from vlm_cli.composition import Activation

__all__ = ["feed_forward"]


class SquaredReLU(nn.Module):
    """Compute max(x, 0)² (Primer, https://arxiv.org/abs/2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "squared_relu": SquaredReLU}


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
