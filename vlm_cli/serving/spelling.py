"""What a single token spells, for the probabilities of an answer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

__all__ = ["Speller"]


class Speller:
    """Turns a token into its text and its bytes.

    The text of a token that holds a part of a character has U+FFFD in its place; its bytes are then those of the text.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._spell = lru_cache(maxsize=2**16)(lambda token: tokenizer.decode([token]))

    def __call__(self, token: int) -> tuple[str, bytes]:
        text: str = self._spell(token)
        return text, text.encode("utf-8", "surrogateescape")
