"""Choose the next token of each row without a look from the host.

B rows, V columns of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["are_numbers", "choose", "draw"]


def choose(scores: Tensor, *, do_sample: bool) -> Tensor:
    """Choose the most likely token of each row, or draw one: float[B, V] logits -> int[B]."""
    return draw(scores.softmax(-1)) if do_sample else scores.argmax(-1)


def draw(chances: Tensor) -> Tensor:
    """Draw a token of each row: float[B, V] probabilities -> int[B].

    These are the tokens, and the random numbers, of `torch.multinomial`, which would wait for the device to check the
    probabilities.
    """
    return (chances / torch.empty_like(chances).exponential_(1)).argmax(-1)


def are_numbers(scores: Tensor) -> Tensor:
    """Say in which rows tokens have probabilities: float[B, V] logits -> bool[B].

    The largest logit is NaN if one of them is, and infinite if all are impossible or one is certain.
    """
    return scores.amax(-1).isfinite()
