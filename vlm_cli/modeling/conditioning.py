"""`Conditioning`: what the hooks in the language model read during one call.

B batch, T positions of a call, T_img media per row, n vision tokens per medium, d channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

__all__ = ["Conditioning", "count_media"]


def count_media(ids: Tensor, media_token_id: int) -> Tensor:
    """Count the media tokens at or before each position: int[*, T] -> int[*, T]."""
    return (ids == media_token_id).cumsum(-1)


@dataclass
class Conditioning:
    """What the hooks read while the language model runs.

    Attributes:
        ids: int[B, T] of the running call, before unknown ids are replaced; before the first call, of the prompt.
        media: what the fusion's `project_media` returned, one row for each row of the prompt; None without media.
        media_mask: bool[B, T_img, n], true for vision tokens that are not padding; None without media.
        media_counts: int[B, T], number of media tokens at or before each position.
        prefix_mask: bool[B, T], true at positions of the prompt that all see each other; None for none.
        segments: int[B, T], the number of each position's row in a packed row, 0 at padding; None without packed rows.
        chosen: int[N] indices of the flattened positions whose logits are computed; None for all.
        most_readers: positions of the prompt after the medium that has most of them before the next one, at most; None
            if nobody has counted them.
        hide_media_logit: whether the logit of `<image>` is set to the lowest number.
        fusion_state: what the fusion's `condition_call` computed for this call; cross-attention: `MediaVisibility`.
        head_input: float[B, T, d], the last input of the language model's head.
        is_embedded: whether the language model's embedding table has run in this call.
        is_checkpointed: whether the running function runs again in the backward pass.
        prompt: the conditioning of the whole prompt, from which each call's is made; None before the first call.
    """

    ids: Tensor
    media: Tensor | None
    media_mask: Tensor | None
    media_counts: Tensor
    prefix_mask: Tensor | None = None
    segments: Tensor | None = None
    chosen: Tensor | None = None
    most_readers: int | None = None
    hide_media_logit: bool = False
    fusion_state: Any = None
    head_input: Tensor | None = None
    is_embedded: bool = False
    is_checkpointed: bool = False
    prompt: Conditioning | None = None

    @property
    def media_positions(self) -> Tensor:
        """`media_counts` under its name until 0.1."""
        return self.media_counts

    def for_call(self, ids: Tensor, media_token_id: int, end: int | None = None) -> Conditioning:
        """Return the conditioning for one call of the language model.

        Rows are repeated for beams. The media counts are those of the call's positions: cut out of the prompt's, or
        continued after its end. With the prompt's counts 0 1 1 2 and `<image>` as I:

            ids        end    media_counts
            a b        4      1 2            the last chunk of the prompt
            c          5      2              a decoded token
            c I        6      2 3            more of the prompt, after a cache

        Args:
            ids: int[B, T] of the call.
            media_token_id: id of `<image>`.
            end: positions read once the call is over; None if unknown.

        Raises:
            ValueError: if the call's rows are not the prompt's rows, each repeated equally often.
        """
        repeats, rest = divmod(ids.shape[0], self.media_counts.shape[0])
        if rest or not repeats:
            raise ValueError(
                f"the language model is conditioned on {len(self.media_counts)} rows, and was called with {len(ids)}."
            )

        def repeated(x: Any) -> Any:
            return x if x is None or repeats == 1 else x.repeat_interleave(repeats, dim=0)

        counts, prefix = repeated(self.media_counts), repeated(self.prefix_mask)
        num, length = ids.shape[1], counts.shape[1]
        if end is not None and num <= end <= length:
            part = slice(end - num, end)
            counts, prefix = counts[:, part], prefix if prefix is None else prefix[:, part]
        elif num != length:
            before = counts[:, -1:] if num < length else 0
            counts = before + count_media(ids, media_token_id)
            # The prompt stands first in a call that reads it again, and in no call after it.
            read = prefix is not None and num > length
            prefix = nn.functional.pad(prefix, (0, num - length)) if read else None
        return replace(
            self,
            ids=ids,
            media_counts=counts,
            prefix_mask=prefix,
            media=repeated(self.media),
            media_mask=repeated(self.media_mask),
        )
