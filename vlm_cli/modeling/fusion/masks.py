"""Masks with blocks: positions of one block see each other, beside all positions before them.

A block is a picture (mask `image`: Gemma 3, https://arxiv.org/abs/2503.19786) or the prompt (mask `prefix`: PaliGemma,
https://arxiv.org/abs/2407.07726). With blocks of the same digit and text as `.`, a row `. 0 0 . 1 1` sees

            .  0  0  .  1  1
        .   x
        0   x  x  x
        0   x  x  x
        .   x  x  x  x
        1   x  x  x  x  x  x
        1   x  x  x  x  x  x

In a packed row (`modeling/packed.py`), a position sees its own row alone.

Nothing here changes the language model. Transformers' models take a mask that was prepared for them, one for each kind
of layer, and `create_masks_for_generate` prepares it with their windows and their padding.
B rows, T positions of a call, S attended positions, T_img media, n vision tokens per medium.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from vlm_cli.errors import LanguageModelLimit, first_line
from vlm_cli.modeling.lm_interface import LanguageModelInterface, num_cached
from vlm_cli.modeling.meta import meta_device

__all__ = ["cuts_a_medium", "find_mask_problem", "find_media_blocks", "prepare_masks"]


def find_media_blocks(is_media: Tensor, media_counts: Tensor, media_mask: Tensor) -> Tensor:
    """Number the pictures at the positions of a call: int[B, T], -1 where text is.

    A picture is a run of media positions of one medium. Text between the views of a medium separates their blocks.

    Args:
        is_media: bool[B, T].
        media_counts: int[B, T], number of media positions at or before each position.
        media_mask: bool[B, T_img, n], true for vision tokens that are not padding.
    """
    medium = _medium_at(media_counts, media_mask)
    before = torch.cat([torch.zeros_like(is_media[:, :1]), is_media[:, :-1]], dim=1)
    changes = torch.cat([torch.ones_like(is_media[:, :1]), medium[:, 1:] != medium[:, :-1]], dim=1)
    return torch.where(is_media, (is_media & (~before | changes)).cumsum(-1), -1)


def _medium_at(media_counts: Tensor, media_mask: Tensor) -> Tensor:
    """Return the number of the medium, from 0, that the latest media position belongs to: int[B, T]."""
    ends = media_mask.sum(-1).cumsum(-1)  # [B, T_img]
    return torch.searchsorted(ends, (media_counts - 1).contiguous(), right=True)


def cuts_a_medium(is_media: Tensor, media_counts: Tensor, media_mask: Tensor) -> bool:
    """Say whether a call begins or ends inside a medium; arguments as for `find_media_blocks`."""
    ends = media_mask.sum(-1).cumsum(-1)
    starts = ends - media_mask.sum(-1)
    medium = _medium_at(media_counts, media_mask).clamp(max=ends.shape[1] - 1)
    begins = media_counts[:, 0] - 1 == starts.gather(1, medium[:, :1])[:, 0]
    finishes = media_counts[:, -1] == ends.gather(1, medium[:, -1:])[:, 0]
    return bool(((is_media[:, 0] & ~begins) | (is_media[:, -1] & ~finishes)).any())


def prepare_masks(
    lm: PreTrainedModel, blocks: Tensor | None, kwargs: Mapping[str, Any], cache: Any, segments: Tensor | None = None
) -> Any:
    """Prepare a language model's masks, in which positions of one block see each other, and of one segment at most.

    Args:
        lm: the language model.
        blocks: int[B, T] of the call, a number for each block, -1 outside; None without blocks.
        kwargs: of the call: `attention_mask`, bool or int[B, cached positions + T] or None, and `position_ids`.
        cache: of the language model; None if it starts without one.
        segments: int[B, T] of packed rows, which the call reads as a whole; None if rows are not packed.

    Returns:
        What the language model takes as `attention_mask`: [B, 1, T, S], or a mapping of kinds of layers to such masks.

    Raises:
        LanguageModelLimit: if no such masks can be prepared.
    """
    attention_mask = kwargs.get("attention_mask")
    if isinstance(attention_mask, Mapping) or (attention_mask is not None and attention_mask.ndim != 2):
        raise LanguageModelLimit(
            "fusion.mask needs an attention_mask of rows and positions, and got one that was already prepared. Call "
            "the VLM's own generate."
        )
    given = segments if blocks is None else blocks
    assert given is not None
    start, last = num_cached(cache) if cache is not None else 0, given.shape[1] - 1

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert blocks is not None
        mine, theirs = blocks[row, query - start], blocks[row, (key - start).clamp(0, last)]
        return (mine >= 0) & (mine == theirs) & (key >= start) & (key <= start + last)

    def is_own(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert segments is not None
        return segments[row, query] == segments[row, key]

    embeddings = torch.empty(*given.shape, 0, dtype=lm.dtype, device=given.device)
    config = lm.config.get_text_config(decoder=True)
    functions = {
        "or_mask_function": None if blocks is None else sees,
        "and_mask_function": None if segments is None else is_own,
    }
    # Padding is a segment of its own, so that a mask of padding would leave its positions nothing to see. Without
    # positions, Transformers does not look for packed rows by itself.
    facts = (attention_mask, cache, kwargs.get("position_ids")) if segments is None else (None, None, None)
    prepared = create_masks_for_generate(config, embeddings, *facts, **functions)
    if not all(isinstance(mask, Tensor) and mask.ndim == 4 for mask in _list_masks(prepared)):
        name = config._attn_implementation
        advice = "" if name in ("sdpa", "eager") else " Choose attn_implementation='sdpa'."
        raise LanguageModelLimit(
            f"{type(lm).__name__} with attn_implementation={name!r} takes no mask for each pair of positions.{advice}"
        )
    return prepared


def _list_masks(prepared: Any) -> list[Any]:
    return list(prepared.values()) if isinstance(prepared, Mapping) else [prepared]


def find_mask_problem(lm: PreTrainedModel, layers: nn.ModuleList) -> str | None:
    """Say why a language model cannot have a mask with blocks; None if every layer's attention gets it.

    The model runs once, with a prepared mask of four positions, on the meta device. Each layer must hand this mask on
    to a module inside of it. Layers that make a mask of their own, or have none, do not.

    Args:
        lm: the language model, on the meta device.
        layers: its decoder layers.
    """
    interface, reached = LanguageModelInterface.of(lm), set()
    masks: list[Any] = []

    def find_mask(number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if any(x is mask or x._base is mask for x in tensors for mask in masks):
            reached.add(number)

    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, number=number: find_mask(number, args, kwargs), with_kwargs=True
        )
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if name
    ]
    try:
        with meta_device(), torch.no_grad():
            ids = torch.zeros(1, 4, dtype=torch.long)
            prepared = prepare_masks(lm, torch.zeros_like(ids), {}, None)
            masks = _list_masks(prepared)
            interface.call(lm, ids, attention_mask=prepared, position_ids=torch.arange(4)[None], use_cache=False)
    except LanguageModelLimit as error:
        return str(error)
    except Exception as error:
        return f"{type(lm).__name__} cannot run with a mask that is prepared for it: {first_line(error)}"
    finally:
        for handle in handles:
            handle.remove()
    if missing := [number for number in range(len(layers)) if number not in reached]:
        return (
            f"layers {', '.join(map(str, missing[:6]))}{' …' * (len(missing) > 6)} of {type(lm).__name__} do not hand "
            "on a mask that is prepared for them"
        )
    return None
