"""Turn token ids into text, in the one way that every command shares.

The text of an answer is what the answer adds to the text of its prompt. A tokenizer alone would drop the first space of
the answer, since many tokenizers write none at the start of a text:

    prompt       A :              "A:"
    both         A : ▁a ▁cat      "A: a cat"
    answer           ▁a ▁cat        " a cat"      the tokenizer alone: "a cat"
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["HALF", "decode", "decode_after", "split_after"]

HALF = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are no character
CONTEXT = 16  # tokens of the prompt that decide how the answer begins: 4 are one character at most

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # the spelling of a token that is one byte


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False, **kwargs: Any
) -> str:
    """Turn token ids into text; bytes that are no character become U+FFFD, and the characters around them stay.

    Args:
        tokenizer: of the model.
        ids: the tokens.
        skip_special_tokens: leave out special tokens.
        kwargs: as in the tokenizer's `decode`.
    """
    # The tokenizer's clean-up would remove spaces that a stream has printed already.
    keywords = {"clean_up_tokenization_spaces": False} | kwargs
    text = str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, **keywords))
    if HALF not in text:
        return text
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if backend is None or decoder is None or decoder.decode(["<0x41>"]) != "A":
        return text
    # This decoder turns each byte of a run into U+FFFD if one of them is no part of a character.
    hidden = (
        {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} if skip_special_tokens else set()
    )
    tokens = [token for i in ids if i not in hidden and (token := backend.id_to_token(i)) is not None]
    return str(decoder.decode([token for run in _byte_runs(tokens) for token in run]))


def decode_after(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """Return the text that `ids` add to the text of the ids before them, by default without special tokens."""
    size = CONTEXT
    while not (start := decode(tokenizer, before[-size:], skip_special_tokens)) and size < len(before):
        size *= 2  # only special tokens stand there
    whole = decode(tokenizer, [*before[-size:], *ids], skip_special_tokens)
    # `start` may end with half a character, which `ids` complete.
    return whole[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(start, whole, strict=False))) :]


def split_after(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to an answer. Bytes of a character are the text of its last token.

    Args:
        tokenizer: of the model.
        before: tokens of the prompt.
        ids: of the answer.
    """
    pieces, done = [], ""
    for end in range(1, len(ids) + 1):
        text = decode_after(tokenizer, before, ids[:end])
        whole = text.rstrip(HALF) if end < len(ids) else text
        pieces.append(whole[len(done) :])
        done = whole if len(whole) > len(done) else done
    return pieces


def _byte_runs(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Split tokens into runs of bytes that spell characters, and all others; U+FFFD replaces bytes that spell none."""
    for is_byte, group in groupby(tokens, key=lambda token: _BYTE.fullmatch(token) is not None):
        run = list(group)
        while is_byte and run:
            try:
                bytes(int(token[3:5], 16) for token in run).decode("utf-8")
                break
            except UnicodeDecodeError as error:
                yield [*run[: error.start], HALF]
                run = run[error.end :]
        yield run
