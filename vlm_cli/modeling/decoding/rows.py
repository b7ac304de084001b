"""`GrowingRows`: rows that grow on the device, token by token; the host looks at them every few tokens.

B rows, L positions of the language model, k positions between two looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.stopping_criteria import MaxLengthCriteria

__all__ = ["GrowingRows", "may_wait"]


def may_wait(part: Any) -> bool:
    """Say whether a stopping criterion reads the tokens on the host, and may do so some tokens later.

    Such a criterion sets `may_wait = True`. It is then called once for each new token, in order, at the next look.
    """
    return bool(getattr(part, "may_wait", False))


class GrowingRows:
    """The tokens of prompts and answers, and which rows are over.

    What the device wrote after the end of a row, before the host found that end, is replaced by padding, so that the
    rows are those of a loop that looks at each token.

    Args:
        prompt: int[B, L].
        criteria: what ends rows: a length, tensor functions, and functions of the host that may wait.
        pad_token_id: int[] of the device, what follows the end of a row; None if rows go on until all are over.
        look_every: tokens between two looks.
        streamer: receives the tokens of each position at the looks.

    Attributes:
        length: positions that the device has written.
        surplus: positions that it wrote behind the end of all rows; None while a row goes on.
    """

    def __init__(
        self,
        prompt: Tensor,
        criteria: Sequence[StoppingCriteria],
        pad_token_id: Tensor | None,
        look_every: int,
        streamer: Any = None,
    ) -> None:
        self.most = min(x.max_length for x in criteria if isinstance(x, MaxLengthCriteria))
        self._at_once = [x for x in criteria if not isinstance(x, MaxLengthCriteria) and not may_wait(x)]
        self._waiting = [x for x in criteria if may_wait(x)]
        self._pad, self._every, self._streamer = pad_token_id, look_every, streamer
        self.surplus: int | None = None
        rows, self.length = prompt.shape
        self._seen = self._start = self.length
        room = max(self.most, self.length + 1) - self.length
        self._ids = torch.cat([prompt, prompt.new_zeros(rows, room)], dim=1)
        self._is_over = torch.zeros(rows, dtype=torch.bool, device=prompt.device)
        self._ends = torch.zeros(rows, room, dtype=torch.bool, device=prompt.device)  # which rows are over, and when
        self._is_sound = torch.ones(rows, dtype=torch.bool, device=prompt.device)
        self._host_ids = self._ids.cpu() if self._waiting else None

    @property
    def ids(self) -> Tensor:
        """int[B, L] so far."""
        return self._ids[:, : self.length]

    def add(self, tokens: Tensor, scores: Any = None, is_sound: Tensor | None = None) -> None:
        """Append a token to each row.

        Args:
            tokens: int[B].
            scores: for the criteria.
            is_sound: bool[B], whether the token could be chosen; None if it could in all rows.
        """
        if is_sound is not None:
            self._is_sound = self._is_sound & is_sound
        if self._pad is not None:
            tokens = torch.where(self._is_over, self._pad, tokens)
        self._ids[:, self.length] = tokens
        self.length += 1
        for criterion in self._at_once:
            self._is_over = self._is_over | criterion(self.ids, scores)
        self._ends[:, self.length - self._start - 1] = self._is_over

    def is_due(self) -> bool:
        """Say whether the host looks now: after some tokens, at the last one, and at the first one of a stream."""
        is_first = self._streamer is not None and self._seen == self._start
        return is_first or self.length - self._seen >= self._every or self.length >= self.most

    def look(self) -> bool:
        """Bring the new tokens to the host, and tell them to those who wait for them.

        Returns:
            Whether all rows are over. `length` is then that of the finished rows, and `surplus` the number of positions
            that the device wrote behind it.

        Raises:
            RuntimeError: if the logits of a token were no numbers.
        """
        first, last = self._seen, self.length
        ends = self._ends[:, first - self._start : last - self._start]
        new = torch.cat([self._ids[:, first:last], ends.long(), self._is_sound.long()[:, None]], dim=1).cpu()
        tokens, ends = new[:, : last - first], new[:, last - first : -1].bool()
        if not new[:, -1].all():
            raise RuntimeError("the language model's logits are NaN or infinite, so that no token can be drawn.")
        late = torch.zeros_like(ends[:, 0])  # rows whose end the host has found now
        self._seen = last
        for i in range(last - first):
            late = late | self._ask(first + i, tokens, ends[:, i] | late)
            if self._streamer is not None:
                self._streamer.put(tokens[:, i])
            if first + i + 1 >= self.most or bool((late | ends[:, i]).all()):
                self.length, self.surplus = first + i + 1, last - first - i - 1
                break
        if late.any():
            self._ids[:, first:last] = tokens.to(self._ids.device)
            self._is_over = self._is_over | late.to(self._is_over.device)
        return self.surplus is not None

    def _ask(self, position: int, tokens: Tensor, is_over: Tensor) -> Tensor:
        """Ask the criteria that waited which rows end at a position; padding replaces what these rows wrote after it.

        Args:
            position: among those of the prompt and the answer.
            tokens: int[B, k], those since the last look, on the host.
            is_over: bool[B], rows that ended before or here.

        Returns:
            bool[B].
        """
        if self._host_ids is None:
            return torch.zeros_like(is_over)
        i = position - self._seen + tokens.shape[1]
        self._host_ids[:, position] = tokens[:, i]
        ids: Any = self._host_ids[:, : position + 1]
        found = torch.stack([criterion(ids, None).bool() for criterion in self._waiting]).any(0) & ~is_over
        if self._pad is not None and found.any():
            tokens[found, i + 1 :] = int(self._pad)
        return found
