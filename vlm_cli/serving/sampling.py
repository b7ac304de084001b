"""How each row of a batch chooses its tokens: rows of several requests stand together, each with its own settings.

B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["RowSampler", "Sampling", "TokenChance"]


@dataclass(frozen=True)
class Sampling:
    """What a request asks for.

    Attributes:
        temperature: 0 takes the most likely token each time.
        top_p: only the most likely tokens that together have this probability.
        seed: equal seeds give equal answers; None for others each time.
        frequency_penalty: is taken from the logit of a token for each time that the answer has it.
        presence_penalty: is taken from the logit of each token that the answer has.
        num_chances: how many likely tokens are told beside each token of the answer; None tells no probabilities.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    num_chances: int | None = None

    def with_seed(self, seed: int | None) -> Sampling:
        """Return the same with another seed; torch takes those of 64 bits."""
        return replace(self, seed=None if seed is None else (seed + 2**63) % 2**64 - 2**63)


@dataclass(frozen=True)
class TokenChance:
    """The probability of a token of an answer, before temperature and penalties.

    Attributes:
        token: its id.
        logprob: logarithm of its probability.
        others: the most likely tokens at its place, and theirs.
    """

    token: int
    logprob: float
    others: tuple[tuple[int, float], ...]


@dataclass
class RowSampler:
    """Chooses the tokens of one row.

    A sample is the largest of `logit / temperature + noise`, with Gumbel noise from the row's own generator (Gumbel's
    trick: each token then wins with its probability). So `generate` may stay greedy for the batch, and a sample does
    not depend on the rows beside it.

    Args:
        sampling: what the request asks for.
    """

    sampling: Sampling
    said: Counter[int] = field(default_factory=Counter)
    _generator: torch.Generator | None = None
    _logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self._generator = torch.Generator()
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)

    @property
    def changes_logits(self) -> bool:
        """Whether the most likely token may not be the one that is chosen."""
        asked = self.sampling
        return asked.temperature > 0 or bool(asked.frequency_penalty or asked.presence_penalty)

    def scores(self, logits: Tensor) -> Tensor:
        """float[V] logits -> float[V], the largest of which is at the next token."""
        if self.sampling.num_chances is not None:
            self._logprobs = logits.float().log_softmax(-1)
        if not self.changes_logits:
            return logits
        scores = self._penalise(logits.float())
        if self._generator is None:
            return scores
        # A temperature near 0 makes every logit infinite; their distances to the largest, it does not.
        scores = _keep_likely((scores - scores.max()).double() / self.sampling.temperature, self.sampling.top_p)
        uniform = torch.rand(len(scores), generator=self._generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        return scores + noise.to(scores)

    def take(self, token: int) -> TokenChance | None:
        """Note the token that was chosen, and return its probability if the request asks for it."""
        self.said[token] += 1
        if self._logprobs is None:
            return None
        values, ids = self._logprobs.topk(min(self.sampling.num_chances or 0, len(self._logprobs)))
        others = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenChance(token, float(self._logprobs[token]), others)

    def _penalise(self, logits: Tensor) -> Tensor:
        asked = self.sampling
        if not self.said or not (asked.frequency_penalty or asked.presence_penalty):
            return logits
        ids = torch.tensor(list(self.said), device=logits.device)
        counts = torch.tensor(list(self.said.values()), dtype=logits.dtype, device=logits.device)
        return logits.index_add(0, ids, -(counts * asked.frequency_penalty + asked.presence_penalty))


def _keep_likely(scores: Tensor, top_p: float) -> Tensor:
    """Leave the most likely tokens that together have the probability `top_p`, and at least one.

    >>> _keep_likely(torch.tensor([0.5, 0.3, 0.2]).log(), 0.6).exp()
    tensor([0.5000, 0.3000, 0.0000])
    """
    if top_p >= 1:
        return scores
    ordered, order = scores.softmax(-1).sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return scores.index_fill(0, order[(before >= top_p) & (before > 0)], -math.inf)
