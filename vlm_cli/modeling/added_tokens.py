"""Rows for new tokens beside the language model's frozen tables.

B batch, T tokens, d channels, V columns of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

__all__ = ["AddedTokens"]


class AddedTokens(nn.Module):
    """Input embeddings and output logits of the tokens that a language model does not have.

    The model's own tables stay as they were published, tied or not. Ids from `first_id` on are ours.

    Args:
        num_tokens: how many tokens are added; may be 0.
        first_id: the first added id.
        dim_embedding: channels of the input embeddings.
        dim_head: channels that the language model's head reads.
        bias: whether the language model's head has a bias.
        base_bias: whether it gets one of ours, which then is the added tokens' too.
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
        """Draw the rows from N(0, 0.02), the usual start of a language model's tables; biases start at zero."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        for bias in (self.head.bias, self.base_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @torch.no_grad()
    def start_at_mean(self, embedding: Any, head: Any, *, chunk: int = 4096) -> None:
        """Move the rows to the mean of the language model's, plus the small noise that tells them apart.

        An untrained token is then no likelier than others. The mean is taken of what the embedding gives, since
        some models scale it.
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
        """int[B, T], float[B, T, d] -> float[B, T, d] with our rows at our ids."""
        if not self.num_tokens:
            return embeddings
        ours = self.embedding((ids - self.first_id).clamp(min=0, max=self.num_tokens - 1))
        return torch.where((ids >= self.first_id)[..., None], ours.to(embeddings.dtype), embeddings)

    def bias_logits(self, logits: Tensor) -> Tensor:
        """float[B, T, V] -> float[B, T, V], with our bias on the columns of the language model's own tokens."""
        if self.base_bias is None:
            return logits
        return logits + nnf.pad(self.base_bias.to(logits.dtype), (0, logits.shape[-1] - self.first_id))

    def append_logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """float[B, T, d], float[B, T, V] -> float[B, T, first_id + num_tokens].

        Columns of padded rows, which no token of the tokenizer has, give way to ours.
        """
        return torch.cat([logits[..., : self.first_id], self.head(hidden).to(logits.dtype)], dim=-1)
