"""Vocabularies that differ: tokens of one tokenizer alone, and tokens that have other ids."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["VocabularyChange", "compare_vocabularies", "describe_template"]

_EXAMPLES = 5


@dataclass(frozen=True)
class Examples:
    """So many tokens, the first ones by name."""

    count: int
    first: list[str]

    @classmethod
    def of(cls, tokens: Collection[str]) -> Examples:
        return cls(len(tokens), sorted(tokens)[:_EXAMPLES])


@dataclass(frozen=True)
class VocabularyChange:
    """How two vocabularies differ.

    Attributes:
        a, b: their numbers of tokens.
        only_a, only_b: tokens that the other one lacks.
        moved: tokens that have another id.
    """

    a: int
    b: int
    only_a: Examples
    only_b: Examples
    moved: Examples

    @property
    def differs(self) -> bool:
        return any(x.count for x in (self.only_a, self.only_b, self.moved))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_vocabularies(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> VocabularyChange:
    """Compare two tokenizers by their tokens and ids."""
    left, right = a.get_vocab(), b.get_vocab()
    return VocabularyChange(
        len(left),
        len(right),
        Examples.of(left.keys() - right.keys()),
        Examples.of(right.keys() - left.keys()),
        Examples.of({token for token in left.keys() & right.keys() if left[token] != right[token]}),
    )


def describe_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Name a chat template by its length and hash; None if there is none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    text = str(template)
    return f"{len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]}"
