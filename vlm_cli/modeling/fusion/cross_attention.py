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
from vlm_cli.modeling.vision_encoder import distinct

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

    Where each position reads one medium of several, attention is computed between each medium and its own readers
    (`Readers`), which for M media is M times less than between all positions and all media.
    """

    attention: Tensor  # bool[B, 1, T_txt, S], or bool[B·T_img, 1, 1, n] with readers: true where a position may look
    reads: Tensor  # bool[B, T_txt, 1]: true where a position sees anything
    feeds: Tensor  # bool[B, T_txt, 1]: true where the feed-forward applies
    readers: Readers | None = None

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
        num_media, n = media_mask.shape[1:]
        position = media_positions[:, :, None]  # [B, T_txt, 1]
        readers = None
        if attend == "last" and num_media > 1:
            readers = Readers.build(media_positions, num_media)
        if readers is None:
            number = torch.arange(1, num_media + 1, device=media_mask.device).repeat_interleave(n)  # [S]
            seen = number == position if attend == "last" else number <= position
            seen = seen & media_mask.flatten(1)[:, None]  # [B, T_txt, S]
            reads = seen.any(-1, keepdim=True)
            # A softmax over nothing is not a number, so that a blind position looks everywhere and is dropped later.
            attention = (seen | ~reads)[:, None]
        else:
            some = media_mask.any(-1)  # [B, T_img]
            reads = (position > 0) & some.gather(1, (media_positions - 1).clamp(min=0))[..., None]
            attention = (media_mask | ~some[..., None]).flatten(0, 1)[:, None, None]
        row_has_media = media_mask.flatten(1).any(-1)[:, None, None]
        feeds = row_has_media & (position >= 0) if feed_forward_before_media else reads
        return cls(attention, reads, feeds, readers)


@dataclass(frozen=True)
class Readers:
    """The positions that read each medium, and where each position stands among them.

    With `media_positions` 0 1 1 2 2 2, the readers of the media are the positions 1 2 · and 3 4 5; · is any.
    """

    positions: Tensor  # int[B, T_img·P] of P readers of each medium
    places: Tensor  # int[B, T_txt] in `positions`; any for a position that reads nothing
    num_media: int

    @classmethod
    def build(cls, media_positions: Tensor, num_media: int) -> Readers | None:
        """None where this would save less than half, or cannot be traced.

        Args:
            media_positions: int[B, T_txt], number of media tokens at or before each position.
            num_media: T_img.
        """
        if torch.compiler.is_compiling() or media_positions.is_meta:
            return None
        counts = nnf.one_hot(media_positions, num_media + 1).sum(1)  # [B, 1 + T_img]
        most = int(counts[:, 1:].max())
        if not 0 < most <= media_positions.shape[1] // 2:
            return None
        # Counts never fall along a row, so that the readers of a medium follow each other.
        number = media_positions - 1
        everyone = torch.arange(media_positions.shape[1], device=media_positions.device)
        start = counts.cumsum(1)[:, :-1]  # [B, T_img]
        positions = start[..., None] + torch.arange(most, device=start.device)  # [B, T_img, P]
        places = number * most + everyone - start.gather(1, number.clamp(min=0))
        return cls(positions.clamp(max=len(everyone) - 1).flatten(1), places.clamp(0, num_media * most - 1), num_media)

    def gather(self, q: Tensor) -> Tensor:
        """float[B, h, T_txt, k] -> float[B·T_img, h, P, k]."""
        index = self.positions[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        return rearrange(q.gather(2, index), "B h (M P) k -> (B M) h P k", M=self.num_media)

    def scatter(self, out: Tensor) -> Tensor:
        """float[B·T_img, h, P, k] -> float[B, h, T_txt, k]."""
        out = rearrange(out, "(B M) h P k -> B h (M P) k", M=self.num_media)
        index = self.places[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3])
        return out.gather(2, index)


def attend_to_media(q: Tensor, keys_values: Tensor, visibility: MediaVisibility) -> Tensor:
    """float[B, h, T_txt, k], float[B, 2, h, S, k] -> float[B, T_txt, h·k]; of no meaning where nothing is seen."""
    readers = visibility.readers
    if readers is not None:
        q = readers.gather(q)
        keys_values = rearrange(keys_values, "B two h (M n) k -> (B M) two h n k", M=readers.num_media)
    k, v = keys_values.unbind(1)
    out = nnf.scaled_dot_product_attention(q, k, v, attn_mask=visibility.attention)
    if readers is not None:
        out = readers.scatter(out)
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
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or vision_tokens.is_meta:
            media = vision_tokens.flatten(1, 2)
            return torch.stack([block.attn.project(media) for block in self.blocks.values()], dim=1)
        B, T, n, _ = vision_tokens.shape
        media, which = distinct(vision_tokens.flatten(0, 1))
        keys_values = None
        for slot, block in enumerate(self.blocks.values()):  # never two copies of what all blocks have together
            found = block.attn.project(media)  # [media, 2, h, n, k]
            if keys_values is None:
                keys_values = found.new_empty(B, len(self.blocks), 2, found.shape[2], T * n, found.shape[4])
            keys_values[:, slot] = rearrange(found[which], "(B T) two h n k -> B two h (T n) k", B=B)
        return keys_values

    def visibility(self, media_positions: Tensor, media_mask: Tensor) -> MediaVisibility:
        return MediaVisibility.build(
            media_positions,
            media_mask,
            attend=self.options.attend,
            feed_forward_before_media=getattr(self.options, "feed_forward_before_media", True),
        )
