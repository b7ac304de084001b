"""Gated cross-attention of Flamingo (https://arxiv.org/abs/2204.14198, section 3.2).

Parameter names and arithmetic are those of open_flamingo, so that published weights load as they are. Visibility,
gates and the set of blocks are those of every fusion that has such blocks.
B batch, T_txt text positions, T_img media, n vision tokens per medium, S = T_img·n attended positions, d channels,
L blocks; inside attention h heads, k head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn

from vlm_cli.composition import Activation

__all__ = ["GatedCrossAttention", "GatedCrossAttentionBlock", "MediaVisibility", "attend_to_media", "feed_forward"]


class SquaredReLU(nn.Module):
    """max(x, 0)² (Primer, https://arxiv.org/abs/2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "squared_relu": SquaredReLU}


def feed_forward(dim: int, mult: int, activation: Activation = "gelu") -> nn.Sequential:
    """LayerNorm, linear, activation, linear; no biases."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        _ACTIVATIONS[activation](),
        nn.Linear(dim * mult, dim, bias=False),
    )


@dataclass(frozen=True)
class MediaVisibility:
    """Which text positions a block changes, and what they see; built once per call.

    With two media of n = 2 tokens, `<image>`s at positions 1 and 3, and `attend="last"`:

        position           0     1     2     3     4
        media_positions    0     1     1     2     2
        attention row      ....  11..  11..  ..11  ..11
        reads              no    yes   yes   yes   yes
    """

    attention: Tensor  # bool[B, 1, T_txt, S]: true where a text position may look
    reads: Tensor  # bool[B, T_txt, 1]: true where a position sees anything
    feeds: Tensor  # bool[B, T_txt, 1]: true where the feed-forward applies

    @classmethod
    def build(
        cls,
        media_positions: Tensor,
        media_mask: Tensor,
        *,
        attend: Literal["last", "all"],
        feed_forward_before_media: bool,
    ) -> MediaVisibility:
        """
        Args:
            media_positions: int[B, T_txt], number of media tokens at or before each position.
            media_mask: bool[B, T_img, n], true for the vision tokens that stand for something.
            attend: the latest medium, or all media so far.
            feed_forward_before_media: whether positions before the first medium get the feed-forward.
        """
        B, num_media, n = media_mask.shape
        number = torch.arange(1, num_media + 1, device=media_mask.device).repeat_interleave(n)  # [S]
        position = media_positions[:, :, None]  # [B, T_txt, 1]
        seen = number == position if attend == "last" else number <= position
        seen = seen & media_mask.flatten(1)[:, None]  # [B, T_txt, S]
        reads = seen.any(-1, keepdim=True)
        row_has_media = media_mask.flatten(1).any(-1)[:, None, None]
        feeds = row_has_media & (position >= 0) if feed_forward_before_media else reads
        # A softmax over nothing is not a number, so that a blind position looks everywhere and is dropped later.
        return cls(attention=(seen | ~reads)[:, None], reads=reads, feeds=feeds)


def attend_to_media(q: Tensor, keys_values: Tensor, visibility: MediaVisibility) -> Tensor:
    """float[B, h, T_txt, k], float[B, 2, h, S, k] -> float[B, T_txt, h·k]; of no meaning where nothing is seen."""
    k, v = keys_values.unbind(1)
    out = nnf.scaled_dot_product_attention(q, k, v, attn_mask=visibility.attention)
    return rearrange(out, "B h T k -> B T (h k)")


class MaskedCrossAttention(nn.Module):
    """Text attends to vision tokens."""

    def __init__(self, dim: int, dim_media: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim_media, 2 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, dim, bias=False)

    def project(self, media: Tensor) -> Tensor:
        """Keys and values of vision tokens: float[B, S, dim_media] -> float[B, 2, h, S, k]."""
        return rearrange(self.to_kv(media), "B S (two h k) -> B two h S k", two=2, h=self.num_heads)

    def forward(self, x: Tensor, keys_values: Tensor, visibility: MediaVisibility) -> Tensor:
        """float[B, T_txt, dim], float[B, 2, h, S, k] -> float[B, T_txt, dim]."""
        q = rearrange(self.to_q(self.norm(x)), "B T (h k) -> B h T k", h=self.num_heads)
        return self.to_out(attend_to_media(q, keys_values, visibility))


class GatedCrossAttentionBlock(nn.Module):
    """`x + tanh(a)·attn(x)`, then `x + tanh(f)·ff(x)`; with both gates at zero, the identity.

    Args:
        attn: normalises its input by `norm`, of `dim` channels, and has `project(media)`, as `MaskedCrossAttention`.
        ff: normalises its input too.
        gate_size: numbers of a gate: one, or one for each channel.
    """

    # Set by Transformers' `gradient_checkpointing_enable`.
    gradient_checkpointing = False
    _gradient_checkpointing_func = None

    def __init__(self, attn: nn.Module, ff: nn.Module, gate_size: int = 1) -> None:
        super().__init__()
        self.attn = attn
        self.attn_gate = nn.Parameter(torch.empty(gate_size))
        self.ff = ff
        self.ff_gate = nn.Parameter(torch.empty(gate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Close the gates."""
        nn.init.zeros_(self.attn_gate)
        nn.init.zeros_(self.ff_gate)

    @property
    def dim(self) -> int:
        return self.attn.norm.normalized_shape[0]

    def forward(self, x: Tensor, keys_values: Tensor, visibility: MediaVisibility) -> Tensor:
        """float[B, T_txt, dim], float[B, 2, h, S, k] -> float[B, T_txt, dim]."""
        if self.gradient_checkpointing and self.training and self._gradient_checkpointing_func is not None:
            return self._gradient_checkpointing_func(self._forward, x, keys_values, visibility)
        return self._forward(x, keys_values, visibility)

    def _forward(self, x: Tensor, keys_values: Tensor, visibility: MediaVisibility) -> Tensor:
        attended = self.attn(x, keys_values, visibility).masked_fill(~visibility.reads, 0)
        x = x + self.attn_gate.tanh() * attended
        return x + self.ff_gate.tanh() * self.ff(x).masked_fill(~visibility.feeds, 0)


class GatedCrossAttention(nn.Module):
    """The blocks of a language model, by number of the decoder layer that each stands before.

    Args:
        options: of the fusion.
        dim: channels of the decoder layers.
        dim_media: channels of the vision tokens.
        layers: numbers of the decoder layers that get a block.
    """

    def __init__(self, options: Any, dim: int, dim_media: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.options = options
        self.blocks = nn.ModuleDict({str(i): self.build_block(options, dim, dim_media) for i in layers})

    @staticmethod
    def build_block(options: Any, dim: int, dim_media: int) -> GatedCrossAttentionBlock:
        return GatedCrossAttentionBlock(
            MaskedCrossAttention(dim, dim_media, options.num_heads, options.head_dim),
            feed_forward(dim, options.ff_mult, options.activation),
        )

    def project(self, vision_tokens: Tensor) -> Tensor:
        """Keys and values of all blocks: float[B, T_img, n, dim_media] -> float[B, L, 2, h, S, k]."""
        media = vision_tokens.flatten(1, 2)
        return torch.stack([block.attn.project(media) for block in self.blocks.values()], dim=1)

    def visibility(self, media_positions: Tensor, media_mask: Tensor) -> MediaVisibility:
        return MediaVisibility.build(
            media_positions,
            media_mask,
            attend=self.options.attend,
            feed_forward_before_media=getattr(self.options, "feed_forward_before_media", True),
        )
