"""One text for the same ids, whoever asks: streamed, printed whole, and after its prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlm_cli.decoding import HALF, decode, decode_after
from vlm_cli.generation.text_stream import TextStream

WORDS = ["▁hello", "▁wor", "ld", "▁", "lo", ".", "'s", "▁a", "é", "▁日", "\ufffd"]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LETTERS = "abcdefghijklmnopqrstuvwxyz:?<>"
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def _byte_level() -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({x: i for i, x in enumerate(["<s>", "</s>", "<unk>", *alphabet])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _fast(backend)


def _llama() -> PreTrainedTokenizerBase:
    """Llama 2's kind: BPE, characters without a token as bytes, no space before the first word."""
    names = ["<unk>", "<s>", "</s>", *BYTES, *dict.fromkeys(["▁", *LETTERS, *WORDS])]
    return LlamaTokenizer(vocab={x: i for i, x in enumerate(names)}, merges=[], add_bos_token=True)


def _unigram() -> PreTrainedTokenizerBase:
    """T5's and Gemma's kind, with bytes."""
    names = dict.fromkeys(["<unk>", "<s>", "</s>", *BYTES, "▁", *LETTERS, *WORDS])
    backend = Tokenizer(models.Unigram([(x, -1.0) for x in names], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _fast(backend)


def _gemma() -> PreTrainedTokenizerBase:
    names = dict.fromkeys(["<unk>", "<s>", "</s>", *BYTES, "▁", *LETTERS, *WORDS])
    backend = Tokenizer(models.BPE({x: i for i, x in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _fast(backend)


def _word_piece() -> PreTrainedTokenizerBase:
    names = ["<unk>", "<s>", "</s>", *LETTERS, *(f"##{c}" for c in LETTERS), "hello", "##lo", ".", "'", "s", "n't", "é"]
    backend = Tokenizer(models.WordPiece({x: i for i, x in enumerate(dict.fromkeys(names))}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return _fast(backend)


def _suffixes() -> PreTrainedTokenizerBase:
    """OpenAI GPT's kind: a word's last token ends with </w>."""
    names = ["<unk>", "<s>", "</s>", *LETTERS, *(f"{c}</w>" for c in LETTERS), "hello</w>", "é"]
    backend = Tokenizer(
        models.BPE({x: i for i, x in enumerate(names)}, [], end_of_word_suffix="</w>", unk_token="<unk>")
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
    return _fast(backend)


def _words() -> PreTrainedTokenizerBase:
    """A tokenizer without a decoder, which puts a space between any two tokens."""
    backend = Tokenizer(
        models.WordLevel({x: i for i, x in enumerate(["<unk>", "<s>", "</s>", *LETTERS, "hello"])}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _fast(backend)


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": _byte_level,
    "llama": _llama,
    "unigram": _unigram,
    "gemma": _gemma,
    "word-piece": _word_piece,
    "suffixes": _suffixes,
    "words": _words,
    "ByT5": ByT5Tokenizer,
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    return KINDS[kind]()


def streamed(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]) -> str:
    pieces: list[str] = []
    stream = TextStream(partial(decode_after, tokenizer), pieces.append, [])
    stream.put(torch.tensor([prompt]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    return "".join(pieces)


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens_have_one_text(kind: str) -> None:
    tokenizer, draw = tokenizer_of(kind), random.Random(kind)
    texts = ["a:", "hello", "a", "<s>a ", "say é 日 "]
    changed = 0
    for text in texts * 4:
        prompt = tokenizer(text).input_ids
        ids = draw.choices(range(len(tokenizer)), k=draw.randrange(1, 24))
        answer = decode_after(tokenizer, prompt, ids)
        assert streamed(tokenizer, prompt, ids) == answer
        both = [decode(tokenizer, x, skip_special_tokens=True) for x in (prompt, [*prompt, *ids])]
        assert both[0] + answer == both[1]
        changed += answer != tokenizer.decode(ids, skip_special_tokens=True)
    # The twin: the tokenizer alone gives other texts, where it treats a text's start or stray bytes apart.
    assert bool(changed) == (kind not in ("byte-level", "ByT5"))


def _reference(tokens: Sequence[str]) -> str:
    """Join pieces and bytes, written from the meaning of the vocabulary."""
    pieces = [x for x in tokens if x not in SPECIAL.values()]
    data = b"".join(bytes([int(x[3:5], 16)]) if x in BYTES else x.replace("▁", " ").encode() for x in pieces)
    return data.decode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["llama", "unigram", "gemma"])
def test_bytes_are_characters_where_they_spell_them(kind: str) -> None:
    tokenizer: Any = tokenizer_of(kind)
    prompt = tokenizer.convert_tokens_to_ids(["a"])
    emoji = ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    rows = [
        [*emoji, "<0xE4>", "▁hello"],
        [*emoji, "<0xE3>", "<0x81>"],
        ["<0x80>", *emoji, "<0xFF>", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "▁a"],
        ["▁a", "</s>", "<0xC3>", "</s>", "<0xA9>"],
    ]
    draw = random.Random(0)
    rows += [draw.choices([*emoji, "<0xC3>", "<0xA9>", "▁hello", "lo", "▁"], k=12) for _ in range(60)]
    for row in rows:
        ids = tokenizer.convert_tokens_to_ids(row)
        assert decode_after(tokenizer, prompt, ids) == _reference(row), row
    # The twin: the tokenizer alone loses the emoji before a stray byte.
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(rows[0])).count(HALF) == 5


def test_a_first_space_is_kept() -> None:
    tokenizer: Any = tokenizer_of("llama")
    for prompt, row, text in ([["a", ":"], ["▁a"], " a"], [["a"], ["lo"], "lo"], [["<s>"], ["▁a"], "a"]):
        ids = tokenizer.convert_tokens_to_ids(prompt), tokenizer.convert_tokens_to_ids(row)
        assert decode_after(tokenizer, *ids) == text
    specials = tokenizer.convert_tokens_to_ids(["a", ":", *["</s>"] * 40])
    assert decode_after(tokenizer, specials, tokenizer.convert_tokens_to_ids(["▁a"])) == " a"
