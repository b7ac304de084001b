"""What `VLM.forward` and `VLM.generate` take: names for the same thing, and media that match their placeholders."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["check_media", "resolve_names"]


def resolve_names(
    method: str, *, lang_x: Iterable[Tensor | None], vision_x: Iterable[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Choose the prompt's tokens and its pixels among their names.

    open_flamingo says `lang_x` and `vision_x`, Transformers says `input_ids` (or `inputs`) and `pixel_values`.

    Args:
        method: name of the method that was called, for the message.
        lang_x: int[B, T_txt] under each of its names; None where a name was not given.
        vision_x: pixels under each of their names.

    Raises:
        ValueError: if no tokens were given.
    """
    tokens = next((x for x in lang_x if x is not None), None)
    if tokens is None:
        raise ValueError(f"lang_x is missing: {method} needs int[B, T_txt] tokens.")
    return tokens, next((x for x in vision_x if x is not None), None)


def check_media(lang_x: Tensor, media_mask: Tensor | None, media_token_id: int) -> None:
    """Check that each row has as many media as media tokens, and padding after its media.

    Args:
        lang_x: int[B, T_txt].
        media_mask: bool[B, T_img, n], true for vision tokens that are not padding; None without media.
        media_token_id: id of `<image>`.

    Raises:
        ValueError: with the first row that does not match.
    """
    if torch.compiler.is_compiling() or lang_x.is_meta:
        return
    tokens = (lang_x == media_token_id).sum(-1)  # [B]
    is_valid = tokens.new_zeros(len(tokens), 1) if media_mask is None else media_mask.any(-1).long()  # [B, T_img]
    if not torch.equal(is_valid, is_valid.cumprod(-1)):
        raise ValueError("vision_mask has padding before a medium; padding comes last in each row.")
    media = is_valid.sum(-1)
    if not torch.equal(tokens, media):
        row = int((tokens != media).nonzero()[0])
        raise ValueError(
            f"row {row} of lang_x has {int(tokens[row])} media tokens, but vision_x has {int(media[row])} media "
            "for it. Give one of each, or mark the padding of vision_x in vision_mask."
        )
