"""End an answer at a text that the user named. Only new text counts, not the end of the prompt.

B rows, L positions of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

__all__ = ["StopStrings", "cut_at_stop"]

CONTEXT = 64  # tokens before a window that decide how its text begins
BYTES = 4  # tokens that one character may take


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string.

    >>> cut_at_stop("a cat. END more", [" END"])
    'a cat.'
    """
    found = [i for i in (text.find(stop) for stop in stops) if i >= 0]
    return text[: min(found)] if found else text


class StopStrings(StoppingCriteria):
    """Ends each row whose new text holds a stop string; one object serves one call of `generate`.

    Args:
        decode: turns the tokens before a text and those of the text into the text.
        stops: the stop strings.
    """

    may_wait = True

    def __init__(self, decode: Callable[[Sequence[int], Sequence[int]], str], stops: Sequence[str]) -> None:
        self.decode, self.stops = decode, stops
        # A stop string ends in the newest tokens, or an earlier call would have found it.
        self.window = BYTES * max(map(len, stops)) + CONTEXT
        self.start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """int[B, L] so far -> bool[B], true where a row ends here."""
        length = input_ids.shape[1]
        if self.start is None:
            self.start = length - 1  # the first call comes after the first new token
        first = max(self.start, length - self.window)
        before = max(0, first - CONTEXT)
        ends = [self.is_in(row, first - before) for row in input_ids[:, before:].tolist()]
        return torch.tensor(ends, dtype=torch.bool, device=input_ids.device)

    def is_in(self, ids: Sequence[int], start: int) -> bool:
        """Say whether the text of the tokens from `start` on holds a stop string."""
        text = self.decode(ids[:start], ids[start:])
        return any(stop in text for stop in self.stops)

    def is_in_newest(self, prompt: Sequence[int], tokens: Sequence[int], newest: int) -> bool:
        """Say whether the last `newest` tokens of an answer complete a stop string."""
        first = max(0, len(tokens) - newest + 1 - self.window)
        before = [*prompt, *tokens[:first]][-CONTEXT:]
        return self.is_in([*before, *tokens[first:]], len(before))
