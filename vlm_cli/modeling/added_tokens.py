"""`AddedTokens`: embeddings and logits of new tokens, beside the language model's frozen tables.

B batch, T tokens, d channels, V columns of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

__all__ = ["AddedTokens"]


class AddedTokens(nn.Module):
    """Hold input embeddings and output rows of the tokens that a language model does not have.

    The language model's own tables stay as they were published, tied or not. Ids from `first_id` on are added tokens.

    Args:
        num_tokens: number of added tokens; may be 0.
        first_id: the first added id.
        dim_embedding: channels of the input embeddings.
        dim_head: channels that the language model's head reads.
        bias: whether the language model's head has a bias; the added rows then have a bias too.
        base_bias: add a bias to the logits of the language model's own tokens, and to those of the added tokens.
    """

    def __init__(
        self,
        num_tokens: int,
        first_id: int,
        *,
        dim_embedding: int,
        dim_head: int,
        bias: bool = False,
        base_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.first_id = first_id
        self.embedding = nn.Embedding(num_tokens, dim_embedding)
        self.head = nn.Linear(dim_head, num_tokens, bias=bias or base_bias)
        self.base_bias = nn.Parameter(torch.empty(first_id)) if base_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows from N(0, 0.02), as is usual for a language model's tables; biases start at zero."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        for bias in (self.head.bias, self.base_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @torch.no_grad()
    def start_at_mean(self, embedding: Any, head: Any, *, chunk: int = 4096) -> None:
        """Add the mean of the language model's rows to the added rows, whose random values keep them distinct.

        An untrained token is then not more probable than other tokens. The mean is over the outputs of the embedding,
        because some language models scale them.

        Args:
            embedding: the language model's input embedding.
            head: the language model's head.
            chunk: rows that are embedded at once.
        """
        if not self.num_tokens:
            return
        device = embedding.weight.device
        total = torch.zeros(self.embedding.embedding_dim, dtype=torch.float64, device=device)
        for ids in torch.arange(self.first_id, device=device).split(chunk):
            total += embedding(ids).double().sum(0)
        self.embedding.weight += (total / self.first_id).to(self.embedding.weight)
        self.head.weight += head.weight[: self.first_id].mean(0).to(self.head.weight)
        if isinstance(self.head.bias, Tensor) and getattr(head, "bias", None) is not None:
            self.head.bias.add_(head.bias[: self.first_id].mean().to(self.head.bias))

    def embed(self, ids: Tensor, embeddings: Tensor) -> Tensor:
        """Replace the embeddings at added ids: int[B, T] ids, float[B, T, d] -> float[B, T, d]."""
        if not self.num_tokens:
            return embeddings
        added = self.embedding((ids - self.first_id).clamp(min=0, max=self.num_tokens - 1))
        return torch.where((ids >= self.first_id)[..., None], added.to(embeddings.dtype), embeddings)

    def bias_logits(self, logits: Tensor) -> Tensor:
        """Add `base_bias`, if there is one, to the logits of the language model's own tokens: float[B, T, V]."""
        if self.base_bias is None:
            return logits
        return logits + nnf.pad(self.base_bias.to(logits.dtype), (0, logits.shape[-1] - self.first_id))

    def append_logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Append the logits of added tokens: float[B, T, d], float[B, T, V] -> float[B, T, first_id + num_tokens].

        Columns from `first_id` on, which pad the language model's table and belong to no token, are dropped first.
        """
        if logits.shape[-1] != self.first_id:  # in the backward pass, a slice of everything costs a copy
            logits = logits[..., : self.first_id]
        return torch.cat([logits, self.head(hidden).to(logits.dtype)], dim=-1)
