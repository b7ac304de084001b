"""Vision tokens among the text tokens (Kosmos-1, https://arxiv.org/abs/2302.14045; BLIP-2; LLaVA).

One `<image>` of a prompt stands for its medium, which takes one position of the language model per vision token.
B batch, T_txt tokens of the prompt, T_img media, n vision tokens per medium, L positions of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ExpandedPrompt", "expand_media_tokens", "pack_valid_tokens", "scatter_media"]


@dataclass(frozen=True)
class ExpandedPrompt:
    """A prompt over the positions of the language model.

    Attributes:
        ids: int[B, L], media tokens repeated, rows padded at the left.
        attention_mask: int[B, L], 0 at padding.
        last: int[B, T_txt], the last position of each token of the prompt.
    """

    ids: Tensor
    attention_mask: Tensor
    last: Tensor

    def fold(self, values: Tensor) -> Tensor:
        """Keep the value of each token's last position: float[B, L, d] at positions -> float[B, T_txt, d] at tokens."""
        index = self.last[..., None].expand(-1, -1, values.shape[-1])
        return values.gather(1, index)


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
        attention_mask: int[B, T_txt], 0 at padding; None for all ones.
        is_media: bool[B, T_txt], true at media tokens.
        num_tokens: int[B, T_img], vision tokens of each medium.
        pad_id: id for the positions before a row.
    """
    mask = torch.ones_like(lang_x) if attention_mask is None else attention_mask
    medium = (is_media.cumsum(-1) - 1).clamp(0, num_tokens.shape[1] - 1)  # [B, T_txt], from 0
    counts = torch.where(is_media, num_tokens.gather(1, medium), 1)  # [B, T_txt], positions of each token
    ends = counts.cumsum(-1)  # [B, T_txt], position after each token
    length = int(ends[:, -1].max())  # L
    ends = ends + (length - ends[:, -1:])  # all rows end at L
    start = ends[:, :1] - counts[:, :1]  # [B, 1]
    position = torch.arange(length, device=lang_x.device).expand(len(lang_x), -1).contiguous()  # [B, L]
    token = torch.searchsorted(ends, position, right=True)  # [B, L], the token at each position
    is_valid = position >= start
    ids = torch.where(is_valid, lang_x.gather(1, token), pad_id)
    return ExpandedPrompt(ids=ids, attention_mask=mask.gather(1, token) * is_valid, last=ends - 1)


def pack_valid_tokens(vision_tokens: Tensor, media_mask: Tensor) -> Tensor:
    """Move each row's valid vision tokens to the front, in order.

    float[B, T_img, n, d], bool[B, T_img, n] -> float[B, T_img·n, d].
    """
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
