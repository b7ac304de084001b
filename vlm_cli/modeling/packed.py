"""Packed rows: short rows that stand one after the other in one row, and do not see each other.

`segments` numbers the rows of a packed row from 1, and is 0 at padding. Two rows `a I b` and `c d` become

    lang_x       p a I b c d
    segments     0 1 1 1 2 2
    positions    0 0 1 2 0 1        each row begins at position 0

The language model gets a mask in which a position sees its own row alone (`fusion/masks.py`), and cross-attention shows
it the media of its own row alone. So a packed row has the losses and gradients of its rows.
B rows, T positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vlm_cli.errors import LanguageModelLimit, first_line
from vlm_cli.modeling.language_model import NO_LEFT_PADDING

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM

__all__ = ["count_within", "find_packing_problem", "last_of_segment", "positions_within", "start_of_segment"]


def start_of_segment(segments: Tensor) -> Tensor:
    """Return where the segment of each position begins: int[B, T] -> int[B, T]."""
    begins = nnf.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    return torch.where(begins, _numbers(segments), 0).cummax(-1).values


def last_of_segment(segments: Tensor) -> Tensor:
    """Return the last position of the segment of each position: int[B, T] -> int[B, T]."""
    length = segments.shape[1]
    return length - 1 - start_of_segment(segments.flip(-1)).flip(-1)


def positions_within(segments: Tensor) -> Tensor:
    """Number the positions of each segment from 0: int[B, T] -> int[B, T]."""
    return _numbers(segments) - start_of_segment(segments)


def count_within(flags: Tensor, segments: Tensor) -> Tensor:
    """Count flags at or before each position, in its segment alone: bool[B, T], int[B, T] -> int[B, T]."""
    counts = flags.cumsum(-1)
    return counts - (counts - flags.long()).gather(1, start_of_segment(segments))


def _numbers(segments: Tensor) -> Tensor:
    return torch.arange(segments.shape[1], device=segments.device).expand_as(segments)


@torch.no_grad()
def find_packing_problem(model: VLM) -> str | None:
    """Say why rows of a model cannot be packed; None if they can.

    The language model reads a row after two different rows, and before another. If the logits of that row differ,
    something in the model sees past the mask, such as a state or a convolution, or counts positions by itself.

    Args:
        model: with its weights.
    """
    lm = model.lang_model
    name = type(lm).__name__
    if not model.encodes_media_independently:
        return "the vision tokenizer reads the media of a row together"
    if (kind := lm.config.model_type) in NO_LEFT_PADDING:
        return f"{name} reads no packed rows: {NO_LEFT_PADDING[kind]}"
    if not model.lm_interface.takes_positions:
        return f"{name} takes no position_ids, by which each row would begin at position 0"
    text = lm.config.get_text_config(decoder=True)
    if getattr(text, "attention_chunk_size", None) or "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        return f"{name} attends within chunks, which would begin at other positions of a row"
    others, row = (torch.arange(18) * 7 + 3).remainder(model.config.first_added_id).split(12)
    first, second, third = others.split(4)
    ids = torch.stack([torch.cat(pair) for pair in ((first, row), (second, row), (row, third))])
    segments = torch.tensor([[1] * 4 + [2] * 6, [1] * 4 + [2] * 6, [1] * 6 + [2] * 4])
    was_training = model.training
    try:
        every = model.eval()(lang_x=ids.to(model.device), segments=segments.to(model.device)).logits.float()
    except LanguageModelLimit as error:
        return str(error)
    except Exception as error:  # whatever a language model raises that takes no such mask
        return f"{name} cannot run with a mask that is prepared for it: {first_line(error)}"
    finally:
        model.train(was_training)
    logits = torch.stack([every[0, 4:], every[1, 4:], every[2, :6]])  # of the row
    is_exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    tolerance = logits.std() * (1e-3 if is_exact else 0.1)
    if bool(((logits - logits[:1]).abs() > tolerance).any()):
        return f"in {name}, a row changes with the rows around it"
    return None
