"""Logits only where they are asked for, and the loss at the tokens that are learned.

The head of a language model is often its largest matrix, and most positions of a training row, those of a picture above
all, teach nothing. So the head runs at the positions before learned tokens, and nowhere else. What a language model
does with its logits afterwards, such as a scale or a cap, is the same at each position.
B rows, T_txt tokens, T positions of the language model, N chosen tokens, d channels, V columns of the logits.
"""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor

from vlm_cli.modeling.fusion.expansion import ExpandedPrompt

__all__ = ["IGNORED", "chosen_positions", "find_learned", "learned_loss", "row_losses"]

IGNORED = -100  # label of a token that the model does not learn


def find_learned(labels: Tensor) -> Tensor:
    """Find the tokens whose next token is learned.

    >>> import torch
    >>> find_learned(torch.tensor([[-100, -100, 7], [-100, 8, 9]]))  # of the tokens 0 1 2 and 3 4 5
    tensor([1, 3, 4])

    Args:
        labels: int[B, T_txt], `IGNORED` where nothing is learned. On an accelerator, the process waits for the result.

    Returns:
        int[N] indices of the flattened tokens.
    """
    learned = nnf.pad(labels[:, 1:] != IGNORED, (0, 1))
    return learned.flatten().nonzero()[:, 0]


def chosen_positions(tokens: Tensor, num_tokens: int, expanded: ExpandedPrompt | None) -> Tensor:
    """Say at which positions of the language model tokens stand.

    Args:
        tokens: int[N] indices of the flattened tokens.
        num_tokens: T_txt, tokens of a row.
        expanded: the prompt over the positions of the language model; None if each token has one.

    Returns:
        int[N] indices of the flattened positions, of each token its last one.
    """
    if expanded is None:
        return tokens
    length = expanded.ids.shape[1]
    return expanded.last.flatten()[tokens] + tokens // num_tokens * length


def learned_loss(logits: Tensor, labels: Tensor, tokens: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Compute the loss of chosen tokens, as `ForCausalLMLoss` of Transformers computes it of all.

    Args:
        logits: float[1, N, V] at the chosen tokens.
        labels: int[B, T_txt].
        tokens: int[N], what `find_learned` returned.
        num_items: what the sum of the losses is divided by; None for their number.

    Returns:
        float[].
    """
    losses = _losses(logits, labels, tokens)
    return losses.mean() if num_items is None else losses.sum() / num_items


def row_losses(logits: Tensor, labels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Compute for each row the sum of its losses and the number of its learned tokens.

    Args:
        logits: float[1, N, V] at the chosen tokens.
        labels: int[B, T_txt].
        tokens: int[N], what `find_learned` returned.

    Returns:
        float[B] sums, int[B] numbers.
    """
    losses = _losses(logits, labels, tokens)
    sums = losses.new_zeros(len(labels)).index_add(0, tokens // labels.shape[1], losses)
    return sums, (labels[:, 1:] != IGNORED).sum(-1)


def _losses(logits: Tensor, labels: Tensor, tokens: Tensor) -> Tensor:
    """Return the loss of each chosen token: float[N]."""
    targets = labels.flatten()[tokens + 1].to(logits.device)
    return nnf.cross_entropy(logits[0].float(), targets, ignore_index=IGNORED, reduction="none")
