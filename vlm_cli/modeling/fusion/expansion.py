"""Vision tokens among the text tokens (Kosmos-1, https://arxiv.org/abs/2302.14045; BLIP-2; LLaVA).

One `<image>` of a prompt stands for its medium, which takes one position of the language model per vision token, and
one for each token of the text that announces its views.
B batch, T_txt tokens of the prompt, T_img media, n vision tokens per medium, L positions of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm_cli.modeling.deduplicate import is_on_host, moved

__all__ = ["ExpandedPrompt", "expand_media_tokens", "insert_media_ids", "pack_valid_tokens", "scatter_media"]


@dataclass(frozen=True)
class ExpandedPrompt:
    """A prompt over the positions of the language model.

    Attributes:
        ids: int[B, L], media tokens repeated, rows padded at the left.
        attention_mask: int[B, L], 0 at padding; with a cache int[B, cached positions + L].
        last: int[B, T_txt], the last position of each token of the prompt.
    """

    ids: Tensor
    attention_mask: Tensor
    last: Tensor

    def fold(self, values: Tensor) -> Tensor:
        """Keep the value of each token's last position: float[B, L, d] at positions -> float[B, T_txt, d] at tokens."""
        index = self.last[..., None].expand(-1, -1, values.shape[-1])
        return values.gather(1, index)

    def spread(self, values: Tensor) -> Tensor:
        """Give each position the value of its token, 0 or false at padding: *[B, T_txt] -> *[B, L]."""
        position = torch.arange(self.ids.shape[1], device=values.device).expand(len(values), -1).contiguous()
        token = torch.searchsorted(self.last.contiguous(), position)  # [B, L]
        return values.gather(1, token).masked_fill(self.attention_mask[:, -self.ids.shape[1] :] == 0, 0)


def expand_media_tokens(
    lang_x: Tensor, attention_mask: Tensor | None, is_media: Tensor, num_tokens: Tensor, pad_id: int
) -> ExpandedPrompt:
    """Repeat each media token once per vision token of its medium.

    With media of 3 vision tokens, `I` for `<image>` and `p` for padding, the rows `a I b` and `a b c` become

        ids     a I I I b        attention_mask   1 1 1 1 1        last   0 3 4
                p p a b c                         0 0 1 1 1               2 3 4

    and these are the steps for the first row: `counts` 1 3 1, `ends` 1 4 5, `token` 0 1 1 1 2.

    Args:
        lang_x: int[B, T_txt].
        attention_mask: int[B, T_txt], 0 at padding, or with a cache int[B, cached positions + T_txt]; None for all
            ones.
        is_media: bool[B, T_txt], true at media tokens.
        num_tokens: int[B, T_img], vision tokens of each medium.
        pad_id: id for the positions before a row.
    """
    medium = (is_media.cumsum(-1) - 1).clamp(0, num_tokens.shape[1] - 1)  # [B, T_txt], from 0
    counts = torch.where(is_media, num_tokens.gather(1, medium), 1)  # [B, T_txt], positions of each token
    return _expand(lang_x, attention_mask, counts, pad_id)[0]


def insert_media_ids(
    lang_x: Tensor, attention_mask: Tensor | None, is_media: Tensor, media_ids: Sequence[Sequence[int]], pad_id: int
) -> ExpandedPrompt:
    """Replace each media token by the ids of its medium, which are media tokens and the text that announces views.

    With `I` for `<image>`, and a medium of two views with the ids `[ I I , I I ]`, the row `a I b` becomes

        ids     a [ I I , I I ] b        last   0 7 8

    Args:
        lang_x: int[B, T_txt].
        attention_mask: int[B, T_txt], 0 at padding, or with a cache int[B, cached positions + T_txt]; None for all
            ones.
        is_media: bool[B, T_txt], true at media tokens.
        media_ids: of each medium, row after row.
        pad_id: id for the positions before a row.
    """
    lengths = torch.tensor([len(ids) for ids in media_ids], device=lang_x.device)
    counts = torch.ones_like(lang_x).masked_scatter(is_media, lengths)  # [B, T_txt], positions of each token
    starts = torch.zeros_like(lang_x).masked_scatter(is_media, lengths.cumsum(0) - lengths)
    expanded, token = _expand(lang_x, attention_mask, counts, pad_id)
    flat = torch.tensor([i for ids in media_ids for i in ids], device=lang_x.device)  # ids of all media
    position = torch.arange(token.shape[1], device=lang_x.device)
    offset = position - (expanded.last - counts + 1).gather(1, token)  # [B, L], from 0 in each token
    within = (starts.gather(1, token) + offset).clamp(0, len(flat) - 1)
    replaced = is_media.gather(1, token) & (offset >= 0)
    return replace(expanded, ids=torch.where(replaced, flat[within], expanded.ids))


def _expand(
    lang_x: Tensor, attention_mask: Tensor | None, counts: Tensor, pad_id: int
) -> tuple[ExpandedPrompt, Tensor]:
    """Repeat each token `counts` times, int[B, T_txt]; return int[B, L], the token at each position, too."""
    mask = torch.ones_like(lang_x) if attention_mask is None else attention_mask
    # With a cache, the mask also covers the positions before `lang_x`.
    before, mask = mask.split([mask.shape[1] - lang_x.shape[1], lang_x.shape[1]], dim=1)
    ends = counts.cumsum(-1)  # [B, T_txt], position after each token
    length = int(ends[:, -1].max())  # L
    ends = ends + (length - ends[:, -1:])  # all rows end at L
    start = ends[:, :1] - counts[:, :1]  # [B, 1]
    position = torch.arange(length, device=lang_x.device).expand(len(lang_x), -1).contiguous()  # [B, L]
    token = torch.searchsorted(ends, position, right=True)  # [B, L], the token at each position
    is_valid = position >= start
    ids = torch.where(is_valid, lang_x.gather(1, token), pad_id)
    mask = torch.cat([before, mask.gather(1, token) * is_valid], dim=1)
    return ExpandedPrompt(ids=ids, attention_mask=mask, last=ends - 1), token


def pack_valid_tokens(vision_tokens: Tensor, media_mask: Tensor) -> Tensor:
    """Move each row's valid vision tokens to the front, in order.

    float[B, T_img, n, d], bool[B, T_img, n] on any device -> float[B, T_img·n, d].
    """
    if is_on_host(media_mask) and bool(media_mask.all()):
        return vision_tokens.flatten(1, 2)
    media_mask = moved(media_mask, vision_tokens.device)
    order = media_mask.flatten(1).logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return vision_tokens.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, vision_tokens.shape[-1]))


def scatter_media(embeddings: Tensor, vision_tokens: Tensor, is_media: Tensor, media_counts: Tensor) -> Tensor:
    """Put the k-th vision token of a row at its k-th media position.

    Args:
        embeddings: float[B, L, d] of all positions.
        vision_tokens: float[B, S, d], in order.
        is_media: bool[B, L].
        media_counts: int[B, L], number of media positions at or before each position.

    Returns:
        float[B, L, d].
    """
    slot = (media_counts - 1).clamp(0, vision_tokens.shape[1] - 1)
    rows = vision_tokens.gather(1, slot[..., None].expand(-1, -1, vision_tokens.shape[-1]))
    return torch.where(is_media[..., None], rows.to(embeddings.dtype), embeddings)
