"""Measure on a model itself whether rows can be packed for it (`packed.py`)."""

from __future__ import annotations

import torch

from vlm_cli.errors import LanguageModelLimit, first_line
from vlm_cli.modeling.language_model import NO_LEFT_PADDING
from vlm_cli.modeling.vlm import VLM

__all__ = ["find_packing_problem"]


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
