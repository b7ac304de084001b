"""Add a composition's tokens to a tokenizer.

This is the only module that touches private attributes of Transformers' tokenizers: `_tokenizer`, and in `_make_plain`
also `_special_tokens_map` and `_extra_special_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

from transformers import AddedToken, PreTrainedTokenizerBase

from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import LanguageModelError

__all__ = ["add_tokens", "make_media_plain", "rename_token"]


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], num_rows: int, first: int | None = None
) -> tuple[list[str], int]:
    """Add a composition's tokens to a tokenizer, and a pad token if the tokenizer has none.

    Every id from the first added one on has a row in the VLM's own table of added tokens. With a tokenizer of 100
    tokens and a language model of 98 rows:

        0 … 97        the language model's rows
        98  99        tokens of the tokenizer for which the language model has no row
        100 101 102   <|endofchunk|>  <image>  <pad>

    gives the five tokens from 98 on, and 98. The last id of a tokenizer is not its number of tokens less one: a
    vocabulary may have holes, as those of GPT-4 and Kimi have before their special tokens.

    Args:
        tokenizer: changed in place; its own special tokens stay special.
        names: tokens to add.
        num_rows: rows of the language model's embedding.
        first: id of the first added token, if the tokenizer has the tokens already.

    Returns:
        The added tokens in the order of their ids, and the first of these ids.

    Raises:
        LanguageModelError: if the tokenizer cannot tell `<image>` from text, has it at an id below `first`, or has a
            hole in its ids where an added token would need one.
    """
    own = tokenizer.get_vocab()
    end = max(own.values(), default=-1) + 1
    if first is None:
        first = min(end, num_rows)
    elif (media := tokenizer.get_vocab().get(MEDIA_TOKEN)) is None or media < first:
        raise LanguageModelError(
            f"the tokenizer has {MEDIA_TOKEN!r} at {media}, but the weights have it at {first} or above. "
            "Give the tokenizer that belongs to the weights: --set language_model.tokenizer=…"
        )
    else:
        _make_plain(tokenizer, MEDIA_TOKEN)
    if end != len(own):
        _reserve_ids(tokenizer, [*names, *(["<pad>"] if tokenizer.pad_token is None else [])], own)
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
    if not _tells_media(tokenizer):
        raise LanguageModelError(
            f"the tokenizer has a special token {MEDIA_TOKEN!r} of its own, which cannot be told from text. "
            "Give another tokenizer: --set language_model.tokenizer=…"
        )
    return _list_added(tokenizer, own, first), first


def make_media_plain(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `<image>` an ordinary token of a tokenizer that has it as a special one; its id stays.

    For the tokenizer of a published VLM, in which the token means what it means to vlm.
    """
    if MEDIA_TOKEN in tokenizer.get_vocab() and not _tells_media(tokenizer):
        _make_plain(tokenizer, MEDIA_TOKEN)


def _tells_media(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a tokenizer reads `<image>` as the token while it reads special tokens as text."""
    media = cast(int, tokenizer.convert_tokens_to_ids(MEDIA_TOKEN))
    ids = tokenizer(f"a{MEDIA_TOKEN}", split_special_tokens=True, add_special_tokens=False)["input_ids"]
    return bool(ids[-1:] == [media])


def _reserve_ids(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], own: Mapping[str, int]) -> None:
    """Give new tokens the ids after the tokenizer's last, if its vocabulary has holes.

    A tokenizer would give them the number of its tokens as the next id, and loading its file would do so again. So this
    function writes the ids into the table of the serialised tokenizer. No merge leads to these entries, so that text
    which spells a token stays text. A tokenizer without such a table keeps its way, and `_list_added` refuses it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    stored = json.loads(backend.to_str())
    table = stored["model"].get("vocab")
    if isinstance(table, dict):
        new = [name for name in dict.fromkeys(names) if name not in own]
        table.update({name: i for i, name in enumerate(new, max(own.values()) + 1)})
        tokenizer._tokenizer = type(backend).from_str(json.dumps(stored))


def _list_added(tokenizer: PreTrainedTokenizerBase, own: Mapping[str, int], first: int) -> list[str]:
    """Return the tokens from the id `first` on, in the order of their ids.

    Args:
        tokenizer: with the added tokens.
        own: its tokens and their ids before any was added.
        first: the first id that has a row in the VLM's table of added tokens.

    Raises:
        LanguageModelError: if an id from `first` on belongs to no token, or a new token's id is below one of the
            tokenizer's own.
    """
    tokens = tokenizer.get_vocab()
    end = max(own.values(), default=-1) + 1
    inside = sorted((i, name) for name, i in tokens.items() if name not in own and i < end)
    by_id = {i: name for name, i in tokens.items()}
    holes = [i for i in range(first, max(by_id) + 1) if i not in by_id]
    if end != len(own):
        new = {i for name, i in tokens.items() if name not in own and name != MEDIA_TOKEN}
        text = " ".join(name for name in tokens if name not in own and name != MEDIA_TOKEN)
        ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        inside += [(i, by_id[i]) for i in ids if i in new]  # a tokenizer of whole words reads the text as the token
    if inside or holes:
        where = f"{inside[0][1]!r} would get the id {inside[0][0]}" if inside else f"no token has the id {holes[0]}"
        raise LanguageModelError(
            f"the vocabulary of the tokenizer has holes: its {len(own)} tokens have ids up to {end - 1}, so {where}. "
            "Give a tokenizer without holes: --set language_model.tokenizer=…"
        )
    return [by_id[i] for i in range(first, max(by_id) + 1)]


def rename_token(tokenizer: PreTrainedTokenizerBase, old: str, new: str) -> None:
    """Give a token another text, in place; its id stays. A tokenizer without the token stays as it is.

    Raises:
        LanguageModelError: if the tokenizer has no file that tells its tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if old not in tokenizer.get_vocab():
        return
    if backend is None:
        raise LanguageModelError(f"the tokenizer has no tokenizer.json, so {old!r} cannot be renamed in it.")
    stored = json.loads(backend.to_str())
    for token in stored["added_tokens"]:
        if token["content"] == old:
            token["content"] = new
    table = stored["model"].get("vocab")
    if isinstance(table, dict):
        stored["model"]["vocab"] = {new if name == old else name: i for name, i in table.items()}
    elif isinstance(table, list):  # of a unigram model: pairs of a token and its score
        stored["model"]["vocab"] = [[new if name == old else name, score] for name, score in table]
    tokenizer._tokenizer = type(backend).from_str(json.dumps(stored))
    renamed = [new if str(x) == old else x for x in tokenizer._extra_special_tokens]
    tokenizer._extra_special_tokens = renamed


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
