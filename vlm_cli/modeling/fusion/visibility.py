"""Which media each text position sees, and attention between media and the positions that read them.

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

from vlm_cli.modeling.packed import last_of_segment, start_of_segment

__all__ = ["MediaVisibility", "Readers", "attend_to_media", "most_readers"]


@dataclass(frozen=True)
class MediaVisibility:
    """Which text positions a block changes, and what they see; built once per call.

    With two media of n = 2 tokens, `<image>` at positions 1 and 3, and `attend="last"`:

        position           0     1     2     3     4
        media_counts       0     1     1     2     2
        attention row      ....  11..  11..  ..11  ..11
        reads              no    yes   yes   yes   yes

    If each position reads one medium of several, attention runs between each medium and its own readers (`Readers`).
    For M media this is M times less work than attention between all positions and all media.

    Attributes:
        attention: true where a position may look: bool[B, 1, T_txt, S], or with readers bool[B·T_img, 1, 1, n].
        reads: bool[B, T_txt, 1], true where a position sees any vision token.
        feeds: bool[B, T_txt, 1], true where the feed-forward applies.
        readers: the readers of each medium; None to attend between all positions and all media.
        bias: what attention adds to its products, 0 or -inf: float of the shape of `attention`; None for 0.
        unread: the positions that are not in `reads`, whose attention is dropped; None for none.
        unfed: the positions that are not in `feeds`; None for none.
    """

    attention: Tensor | None = None
    reads: Tensor | None = None
    feeds: Tensor | None = None
    readers: Readers | None = None
    bias: Tensor | None = None
    unread: Tensor | None = None
    unfed: Tensor | None = None

    @classmethod
    def build(
        cls,
        media_counts: Tensor,
        media_mask: Tensor,
        *,
        attend: Literal["last", "all"],
        feed_forward_before_media: bool,
        attend_before_media: bool = False,
        segments: Tensor | None = None,
        readers_bound: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> MediaVisibility:
        """Compute the masks of one call.

        Args:
            media_counts: int[B, T_txt], number of media tokens at or before each position.
            media_mask: bool[B, T_img, n], true for vision tokens that are not padding.
            attend: text sees the last medium before it ("last"), or all media before it ("all").
            feed_forward_before_media: whether positions before the first medium get the feed-forward.
            attend_before_media: whether positions before the first medium read all media of their row, the padded
                views of these media included, as in Transformers' Mllama.
            segments: int[B, T_txt] of packed rows, which see their own media alone; None if rows are not packed.
            readers_bound: as for `Readers.build`.
            dtype: of `bias`. Each block would otherwise make it from `attention`.
        """
        num_media, n = media_mask.shape[1:]
        position = media_counts[:, :, None]  # [B, T_txt, 1]
        number = torch.arange(1, num_media + 1, device=media_mask.device).repeat_interleave(n)  # [S]
        own = OwnMedia.of(media_counts, media_mask, segments)
        is_own = (number > own.before) & (number <= own.last)  # [B, T_txt, S] or what becomes that
        readers = None
        if attend == "last" and num_media > 1 and not attend_before_media:
            readers = Readers.build(media_counts, num_media, readers_bound)
        if readers is None:
            seen = (number == position if attend == "last" else number <= position) & is_own
            seen = seen & media_mask.flatten(1)[:, None]  # [B, T_txt, S]
            reads = seen.any(-1, keepdim=True)
            # A softmax over no key is NaN, so a position that sees nothing looks everywhere; `reads` drops its result.
            attention = (seen | ~reads)[:, None]
        else:
            some = media_mask.any(-1)  # [B, T_img]
            reads = (position > own.before) & some.gather(1, (media_counts - 1).clamp(min=0))[..., None]
            attention = (media_mask | ~some[..., None]).flatten(0, 1)[:, None, None]
        everyone = own.exists & (position >= 0)
        feeds = everyone if feed_forward_before_media else reads
        if attend_before_media:
            whole = media_mask.any(-1, keepdim=True).expand_as(media_mask).flatten(1)[:, None]  # [B, 1, S]
            whole = whole & is_own
            attention, reads = torch.where(reads | ~everyone, attention[:, 0], whole)[:, None], everyone
        bias = torch.zeros_like(attention, dtype=dtype).masked_fill(~attention, -torch.inf)
        unread = ~reads
        return cls(attention, reads, feeds, readers, bias, unread, unread if feeds is reads else ~feeds)


@dataclass(frozen=True)
class OwnMedia:
    """Which media of a row belong to a position: all of them, or in a packed row those of the position's own row.

    Attributes:
        before: number of media before the position's own: 0, or int[B, T_txt, 1].
        last: number of the last of the position's own media, from 1: T_img, or int[B, T_txt, 1].
        exists: bool[B, 1 or T_txt, 1], whether the position has any.
    """

    before: Tensor | int
    last: Tensor | int
    exists: Tensor

    @classmethod
    def of(cls, media_counts: Tensor, media_mask: Tensor, segments: Tensor | None) -> OwnMedia:
        """Find the media of each position; arguments as for `MediaVisibility.build`."""
        if segments is None:
            return cls(0, media_mask.shape[1], media_mask.flatten(1).any(-1)[:, None, None])
        earlier = nnf.pad(media_counts[:, :-1], (1, 0))
        before = earlier.gather(1, start_of_segment(segments))[..., None]
        last = media_counts.gather(1, last_of_segment(segments))[..., None]
        return cls(before, last, last > before)


@dataclass(frozen=True)
class Readers:
    """The text positions that read each medium, with `attend="last"`.

    Media counts never fall along a row, so the readers of a medium are consecutive positions. In a row of six positions
    and two media, the first has two readers and the second has three; P = 3 is the largest number:

        position          0  1  2  3  4  5
        media_counts      0  1  1  2  2  2

                          medium 1   medium 2
        positions         1  2  3    3  4  5      the third reader of medium 1 is filler

        position          0  1  2  3  4  5
        slots             0  0  1  3  4  5        position 0 reads nothing; its slot is arbitrary

    `gather` brings the queries into the order of `positions`, so that each medium attends to its own P queries;
    `scatter` brings the results back by `slots`.

    Attributes:
        positions: int[B, T_img·P], text positions: P readers of each medium.
        slots: int[B, T_txt], index in `positions` of each text position; arbitrary for a position that reads nothing.
        num_media: T_img.
    """

    positions: Tensor
    slots: Tensor
    num_media: int

    @classmethod
    def build(cls, media_counts: Tensor, num_media: int, bound: int | None = None) -> Readers | None:
        """Find the readers. None if this saves less than half of the work, or while torch traces the model.

        Args:
            media_counts: int[B, T_txt], number of media tokens at or before each position.
            num_media: T_img.
            bound: a P that no medium of the prompt exceeds, which a process knows that has the prompt on the CPU; None
                to count, for which an accelerator has to be waited for.
        """
        length = media_counts.shape[1]
        if torch.compiler.is_compiling() or media_counts.is_meta or length < 2:
            return None
        most = most_readers(media_counts, num_media) if bound is None else bound  # P
        if not 0 < most <= length // 2:
            return None
        numbers = torch.arange(num_media + 1, device=media_counts.device)
        num_readers = (media_counts[..., None] == numbers).sum(1)  # [B, 1 + T_img]; first, those of no medium
        medium = media_counts - 1  # [B, T_txt], from 0; -1 before the first medium
        everyone = torch.arange(media_counts.shape[1], device=media_counts.device)  # [T_txt]
        start = num_readers.cumsum(1)[:, :-1]  # [B, T_img], first reader of each medium
        positions = start[..., None] + torch.arange(most, device=start.device)  # [B, T_img, P]
        slots = medium * most + everyone - start.gather(1, medium.clamp(min=0))  # [B, T_txt]
        return cls(positions.clamp(max=len(everyone) - 1).flatten(1), slots.clamp(0, num_media * most - 1), num_media)

    def gather(self, q: Tensor) -> Tensor:
        """Give each medium its readers: float[B, h, T_txt, k] -> float[B·T_img, h, P, k]."""
        index = self.positions[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])  # [B, h, T_img·P, k]
        return rearrange(q.gather(2, index), "B h (M P) k -> (B M) h P k", M=self.num_media)

    def scatter(self, out: Tensor) -> Tensor:
        """Put the readers back into the order of the text: float[B·T_img, h, P, k] -> float[B, h, T_txt, k]."""
        out = rearrange(out, "(B M) h P k -> B h (M P) k", M=self.num_media)
        index = self.slots[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3])
        return out.gather(2, index)


def most_readers(media_counts: Tensor, num_media: int) -> int:
    """Count the positions after the medium that has most of them before the next: int[B, T_txt] media counts."""
    numbers = torch.arange(1, num_media + 1, device=media_counts.device)
    return int((media_counts[..., None] == numbers).sum(1).max())


def attend_to_media(q: Tensor, keys_values: Tensor, visibility: MediaVisibility) -> Tensor:
    """Attend from text to vision tokens.

    Args:
        q: float[B, h, T_txt, k] queries.
        keys_values: float[B, 2, g, S, k]; each of the g heads serves h/g neighbouring heads of queries.
        visibility: of the call; one that hides nothing if its `bias` is None.

    Returns:
        float[B, T_txt, h·k]; arbitrary where `visibility.reads` is false.
    """
    readers = visibility.readers
    if readers is not None:
        q = readers.gather(q)
        keys_values = rearrange(keys_values, "B two h (M n) k -> (B M) two h n k", M=readers.num_media)
    k, v = keys_values.unbind(1)
    is_grouped = k.shape[1] != q.shape[1]
    bias = None if visibility.bias is None else visibility.bias.to(q.dtype)
    out = nnf.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=is_grouped)
    if readers is not None:
        out = readers.scatter(out)
    return out.transpose(1, 2).flatten(2)
