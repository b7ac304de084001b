"""The words of an answer: its tokens with their log-probabilities and alternatives, put together.

A tokens of an answer, V tokens of the vocabulary, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_cli.decoding import decode_after, split_after
from vlm_cli.tracing.trace import Alternative, Word, WordToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["average_words", "make_words", "sum_words"]

_INSIDE = "'\N{RIGHT SINGLE QUOTATION MARK}"  # characters that may stand inside of a word
_SPACELESS = "\N{CJK RADICAL REPEAT}"  # from this character on, scripts write no space between words


def group_pieces(pieces: Sequence[str]) -> list[int]:
    """Return the number of the word to which each piece belongs.

    >>> group_pieces([" a", " lar", "ge", " cat", ".", "\\n", "It", "'s"])
    [0, 1, 1, 2, 3, 4, 5, 5]
    """
    numbers: list[int] = []
    last = ""  # character before the piece
    for piece in pieces:
        begins = not numbers or (bool(piece) and _begins_word(last, piece[0]))
        numbers.append(len(set(numbers)) - (not begins))
        last = piece[-1:] or last
    return numbers


def _begins_word(last: str, first: str) -> bool:
    if first.isspace() or last.isspace() or not last:
        return bool(last)
    if first >= _SPACELESS and first.isalpha():
        return True
    return _is_inside(last) != _is_inside(first)


def _is_inside(character: str) -> bool:
    return character.isalnum() or character in _INSIDE


def make_words(
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[int],
    ids: Sequence[int],
    log_probabilities: Tensor,
    top: int,
) -> tuple[list[Word], list[int]]:
    """Put the tokens of an answer together to words.

    Args:
        tokenizer: of the model.
        before: tokens of the prompt.
        ids: A tokens of the answer.
        log_probabilities: float[A, V], of all tokens at each place of the answer.
        top: alternatives of each token.

    Returns:
        The words, and for each token the number of its word.
    """
    pieces = split_after(tokenizer, before, ids)
    best = log_probabilities.topk(min(top, log_probabilities.shape[1]), dim=-1)
    tokens = []
    for i, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
        read = [*before, *ids[:i]]
        alternatives = tuple(
            Alternative(_spell(tokenizer, read, other), float(value.exp()))
            for other, value in zip(best.indices[i].tolist(), best.values[i], strict=True)
        )
        tokens.append(WordToken(token, piece, float(log_probabilities[i, token]), alternatives))
    numbers = group_pieces(pieces)
    words = []
    for number in range(max(numbers) + 1):
        own = tuple(token for token, other in zip(tokens, numbers, strict=True) if other == number)
        words.append(Word("".join(token.text for token in own), own))
    return words, numbers


def _spell(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token: int) -> str:
    """Return the text that a token adds; of a token without text, such as a stop token, its name."""
    return decode_after(tokenizer, before, [token]) or str(tokenizer.convert_ids_to_tokens(token))


def sum_words(values: Tensor, numbers: Sequence[int]) -> Tensor:
    """Add up what the tokens of each word have: float[A, …] -> float[W, …]."""
    index = torch.tensor(numbers)
    return values.new_zeros(max(numbers) + 1, *values.shape[1:]).index_add(0, index, values)


def average_words(values: Tensor, numbers: Sequence[int]) -> Tensor:
    """Average what the tokens of each word have: float[A, …] -> float[W, …]."""
    counts = sum_words(torch.ones(len(values)), numbers)
    return sum_words(values, numbers) / counts.view(-1, *[1] * (values.ndim - 1))
