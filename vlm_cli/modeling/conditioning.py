"""`Conditioning`: what the hooks in the language model read during one call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vlm_cli.modeling.fusion.visibility import MediaVisibility

__all__ = ["Conditioning", "count_media"]


def count_media(ids: Tensor, media_token_id: int) -> Tensor:
    """Count the media tokens at or before each position: int[*, T] -> int[*, T]."""
    return (ids == media_token_id).cumsum(-1)


@dataclass
class Conditioning:
    """What the hooks read while the language model runs.

    Attributes:
        ids: int[B, T] of the running call, as the user wrote them; before the first call, of the prompt.
        media: the fusion's own form of the vision tokens, one row for each row of the prompt; None without media.
        media_mask: bool[B, T_img, n], true for the vision tokens that stand for something.
        media_counts: int[B, T], number of media tokens at or before each position.
        hide_media_logit: whether `<image>` gets no chance.
        visibility: what each position sees; set by the cross-attention.
        head_input: float[B, T, d] that the head read last.
        is_checkpointed: whether what runs is computed again in the backward pass.
        prompt: what each call starts from; None before the first.
    """

    ids: Tensor
    media: Tensor | None
    media_mask: Tensor | None
    media_counts: Tensor
    hide_media_logit: bool = False
    visibility: MediaVisibility | None = None
    head_input: Tensor | None = None
    is_checkpointed: bool = False
    prompt: Conditioning | None = None

    def for_call(self, ids: Tensor, media_token_id: int, end: int | None = None) -> Conditioning:
        """The same for one call of the language model, which may repeat rows, and read a piece of the prompt or what
        follows it.

        Args:
            ids: int[B, T] of the call.
            media_token_id: id of `<image>`.
            end: how many positions will have been read after the call; None if that is not known.

        Raises:
            ValueError: if the rows are not those of the prompt, each repeated as often.
        """
        repeats, rest = divmod(ids.shape[0], self.media_counts.shape[0])
        if rest or not repeats:
            raise ValueError(
                f"the language model is conditioned on {len(self.media_counts)} rows, and was called with {len(ids)}."
            )

        def rows(x: Any) -> Any:
            return x if x is None or repeats == 1 else x.repeat_interleave(repeats, dim=0)

        positions = rows(self.media_counts)
        num, length = ids.shape[1], positions.shape[1]
        if end is not None and num <= end <= length:
            positions = positions[:, end - num : end]
        elif num != length:
            before = positions[:, -1:] if num < length else 0
            positions = before + count_media(ids, media_token_id)
        return replace(self, ids=ids, media_counts=positions, media=rows(self.media), media_mask=rows(self.media_mask))
