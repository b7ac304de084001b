"""Which medium each text position sees, and attention between media and their readers.

Source: Flamingo (https://arxiv.org/abs/2204.14198), section 3.1.3; the arithmetic is that of open_flamingo.
B batch, T_txt text positions, T_img media, n vision tokens per medium, S = T_img·n attended positions; inside attention
h heads, k head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor

__all__ = ["MediaVisibility", "Readers", "attend_to_media"]


@dataclass(frozen=True)
class MediaVisibility:
    """Which text positions a block changes, and what they see; built once per call.

    With two media of n = 2 tokens, `<image>`s at positions 1 and 3, and `attend="last"`:

        position           0     1     2     3     4
        media_counts    0     1     1     2     2
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
        media_counts: Tensor,
        media_mask: Tensor,
        *,
        attend: Literal["last", "all"],
        feed_forward_before_media: bool,
    ) -> MediaVisibility:
        """
        Args:
            media_counts: int[B, T_txt], number of media tokens at or before each position.
            media_mask: bool[B, T_img, n], true for the vision tokens that stand for something.
            attend: the latest medium, or all media so far.
            feed_forward_before_media: whether positions before the first medium get the feed-forward.
        """
        num_media, n = media_mask.shape[1:]
        position = media_counts[:, :, None]  # [B, T_txt, 1]
        readers = None
        if attend == "last" and num_media > 1:
            readers = Readers.build(media_counts, num_media)
        if readers is None:
            number = torch.arange(1, num_media + 1, device=media_mask.device).repeat_interleave(n)  # [S]
            seen = number == position if attend == "last" else number <= position
            seen = seen & media_mask.flatten(1)[:, None]  # [B, T_txt, S]
            reads = seen.any(-1, keepdim=True)
            # A softmax over nothing is not a number, so that a blind position looks everywhere and is dropped later.
            attention = (seen | ~reads)[:, None]
        else:
            some = media_mask.any(-1)  # [B, T_img]
            reads = (position > 0) & some.gather(1, (media_counts - 1).clamp(min=0))[..., None]
            attention = (media_mask | ~some[..., None]).flatten(0, 1)[:, None, None]
        row_has_media = media_mask.flatten(1).any(-1)[:, None, None]
        feeds = row_has_media & (position >= 0) if feed_forward_before_media else reads
        return cls(attention, reads, feeds, readers)


@dataclass(frozen=True)
class Readers:
    """The positions that read each medium, and where each position stands among them.

    With `media_counts` 0 1 1 2 2 2, the readers of the media are the positions 1 2 · and 3 4 5; · is any.
    """

    positions: Tensor  # int[B, T_img·P] of P readers of each medium
    places: Tensor  # int[B, T_txt] in `positions`; any for a position that reads nothing
    num_media: int

    @classmethod
    def build(cls, media_counts: Tensor, num_media: int) -> Readers | None:
        """None where this would save less than half, or cannot be traced.

        Args:
            media_counts: int[B, T_txt], number of media tokens at or before each position.
            num_media: T_img.
        """
        if torch.compiler.is_compiling() or media_counts.is_meta:
            return None
        counts = nnf.one_hot(media_counts, num_media + 1).sum(1)  # [B, 1 + T_img]
        most = int(counts[:, 1:].max())
        if not 0 < most <= media_counts.shape[1] // 2:
            return None
        # Counts never fall along a row, so that the readers of a medium follow each other.
        number = media_counts - 1
        everyone = torch.arange(media_counts.shape[1], device=media_counts.device)
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
