"""Add a composition's tokens to a tokenizer.

This is the only module that touches private attributes of Transformers' tokenizers: `_make_plain` uses `_tokenizer`,
`_special_tokens_map` and `_extra_special_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

from transformers import AddedToken, PreTrainedTokenizerBase

from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import LanguageModelError

__all__ = ["add_tokens"]


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], num_rows: int, first: int | None = None
) -> tuple[list[str], int]:
    """Add a composition's tokens to a tokenizer, and a pad token if the tokenizer has none.

    Every id from the first added one on has a row in the VLM's own table of added tokens. With a tokenizer of 100
    tokens and a language model of 98 rows:

        0 … 97        the language model's rows
        98  99        tokens of the tokenizer for which the language model has no row
        100 101 102   <|endofchunk|>  <image>  <pad>

    gives the five tokens from 98 on, and 98.

    Args:
        tokenizer: changed in place; its own special tokens stay special.
        names: tokens to add.
        num_rows: rows of the language model's embedding.
        first: id of the first added token, if the tokenizer has the tokens already.

    Returns:
        The added tokens in the order of their ids, and the first of these ids.

    Raises:
        LanguageModelError: if the tokenizer cannot tell `<image>` from text, or has it at an id below `first`.
    """
    if first is None:
        first = min(len(tokenizer), num_rows)
    elif (media := tokenizer.get_vocab().get(MEDIA_TOKEN)) is None or media < first:
        raise LanguageModelError(
            f"the tokenizer has {MEDIA_TOKEN!r} at {media}, but the weights have it at {first} or above. "
            "Give the tokenizer that belongs to the weights: --set language_model.tokenizer=…"
        )
    else:
        _make_plain(tokenizer, MEDIA_TOKEN)
    for name in names:
        # `<image>` is not special: the processor must find it while it reads other special tokens as text.
        special = name != MEDIA_TOKEN
        token = AddedToken(name, special=special, normalized=False, lstrip=False, rstrip=False)
        tokenizer.add_tokens([token], special_tokens=special)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is what is saved
    for trace in ("local_files_only", "is_local"):  # how this machine found the tokenizer; not to be saved
        tokenizer.init_kwargs.pop(trace, None)
    media = cast(int, tokenizer.convert_tokens_to_ids(MEDIA_TOKEN))
    if tokenizer(f"a{MEDIA_TOKEN}", split_special_tokens=True, add_special_tokens=False)["input_ids"][-1:] != [media]:
        raise LanguageModelError(
            f"the tokenizer has a special token {MEDIA_TOKEN!r} of its own, which cannot be told from text. "
            "Give another tokenizer: --set language_model.tokenizer=…"
        )
    return cast(list[str], tokenizer.convert_ids_to_tokens(list(range(first, len(tokenizer))))), first


def _make_plain(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make one of the tokenizer's special tokens an ordinary added token.

    Adding the token again does not change its flags, so this function changes the entry in the serialised tokenizer.
    Some tokenizers also list the token under a name (`image_token`), which would make it special again at loading.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        stored = json.loads(backend.to_str())
        for token in stored["added_tokens"]:
            if token["content"] == name:
                token.update(special=False, normalized=False, lstrip=False, rstrip=False)
        tokenizer._tokenizer = type(backend).from_str(json.dumps(stored))
    for key in [key for key, token in tokenizer._special_tokens_map.items() if str(token) == name]:
        del tokenizer._special_tokens_map[key]
        tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [x for x in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if x != key]
        for kept in (tokenizer.init_kwargs, tokenizer.init_kwargs.get("model_specific_special_tokens", {})):
            kept.pop(key, None)
    tokenizer._extra_special_tokens = [x for x in tokenizer._extra_special_tokens if str(x) != name]
