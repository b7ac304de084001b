"""A tokenizer as llama.cpp holds it.

llama.cpp has its own tokenizers and knows them by name. A byte-level BPE of Transformers becomes its `gpt2`, with the
name of how text is split into words first; a BPE that falls back to bytes, as SentencePiece's, becomes its `llama`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from vlm_cli.errors import UsageError
from vlm_cli.plain_data import parse_json

__all__ = ["Vocabulary", "read_vocabulary"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

#: How text is split before the BPE -> llama.cpp's name of it, and of it where whole words are looked up first.
_SPLITS: dict[tuple[str, ...], tuple[str, str | None]] = {
    ("bytes",): ("gpt-2", None),
    ("digits", "bytes"): ("smollm", None),
    (_LLAMA3,): ("dbrx", "llama-bpe"),
    (_QWEN2,): ("qwen2", None),
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: llama.cpp's name of the tokenizer's model.
        pre: llama.cpp's name of how text is split.
        tokens: the text of each token.
        types: llama.cpp's type of each token.
        merges: of the BPE, in their order.
        scores: of each token, for `llama`.
        adds_space: whether a text gets a space at its start, for `llama`.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    adds_space: bool

    def describe(
        self, tokenizer: PreTrainedTokenizerBase, stops: list[int], template: str, *, adds_bos: bool
    ) -> Callable[[gguf.GGUFWriter], None]:
        """Return a function that writes the keys of a tokenizer.

        Args:
            tokenizer: names the special tokens.
            stops: ids that end an answer.
            template: the chat template.
            adds_bos: whether a text begins with the tokenizer's first token.
        """

        def write(writer: gguf.GGUFWriter) -> None:
            writer.add_tokenizer_model(self.model)
            writer.add_tokenizer_pre(self.pre)
            writer.add_token_list(self.tokens)
            writer.add_token_types(self.types)
            if self.scores:
                writer.add_token_scores(self.scores)
                writer.add_add_space_prefix(self.adds_space)
            else:
                writer.add_token_merges(self.merges)
            writer.add_add_bos_token(adds_bos)
            writer.add_add_eos_token(False)
            for name, add in (("bos", writer.add_bos_token_id), ("unk", writer.add_unk_token_id)):
                token = getattr(tokenizer, f"{name}_token_id")
                if token is not None and token < len(self.tokens):
                    add(token)
            for token, add in zip(stops, (writer.add_eos_token_id, writer.add_eot_token_id), strict=False):
                add(token)
            writer.add_chat_template(template)

        return write


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Vocabulary:
    """Read a tokenizer.

    Args:
        tokenizer: of the VLM.
        ids: of the tokens that the file holds, in their order there.

    Raises:
        UsageError: if llama.cpp has no such tokenizer, or none that this module recognises.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refuse(f"the tokenizer is {type(tokenizer).__name__}, without a tokenizer.json")
    data = parse_json(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise _refuse(f"the tokenizer's model is {model['type']}")
    merges = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    added = {x["id"]: x for x in data["added_tokens"]}
    if model.get("byte_fallback"):
        adds_space = _adds_space(data)
        name, pre, scores = "llama", "default", _scores(merges)
    else:
        name, pre, scores, adds_space = "gpt2", _find_split(data, model), {}, False
    texts = {i: text for text, i in model["vocab"].items()} | {i: x["content"] for i, x in added.items()}
    tokens, types = [], []
    for i in ids:
        tokens.append(texts.get(i, f"[PAD{i}]"))
        types.append(int(_type_of(i, texts, added, tokenizer.unk_token_id if scores else None, bool(scores))))
    return Vocabulary(
        name, pre, tokens, types, merges, [scores.get(x, -1e6) for x in tokens] if scores else [], adds_space
    )


def _type_of(i: int, texts: dict[int, str], added: dict[int, Any], unknown: int | None, has_bytes: bool) -> TokenType:
    if i not in texts:
        return TokenType.UNUSED
    if i == unknown:
        return TokenType.UNKNOWN
    if i in added:
        return TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if has_bytes and _BYTE.fullmatch(texts[i]) else TokenType.NORMAL


def _scores(merges: list[str]) -> dict[str, float]:
    """Give each token the place of the first merge that makes it: llama.cpp merges the best score first."""
    scores: dict[str, float] = {}
    for place, merge in enumerate(merges):
        scores.setdefault(merge.replace(" ", "", 1), -float(place))
    return scores


def _adds_space(data: dict[str, Any]) -> bool:
    """Tell whether a BPE with bytes puts a space before a text.

    Raises:
        UsageError: if it changes text in another way than SentencePiece's do.
    """
    steps = _steps(data.get("normalizer"), "normalizers")
    before = _steps(data.get("pre_tokenizer"), "pretokenizers")
    plain = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if steps == [{"type": "Prepend", "prepend": "▁"}, plain] and not before:
        return True
    if steps == [plain] and (not before or [x["type"] for x in before] == ["Split"]):
        return False
    metaspace = [x for x in before if x["type"] == "Metaspace"]
    if not steps and len(before) == len(metaspace) == 1 and not metaspace[0].get("split", True):
        return metaspace[0].get("prepend_scheme") != "never"
    raise _refuse("the tokenizer changes text in a way of its own before the BPE")


def _find_split(data: dict[str, Any], model: dict[str, Any]) -> str:
    """Return llama.cpp's name of how a byte-level BPE splits text into words."""
    normal = [x["type"] for x in _steps(data.get("normalizer"), "normalizers")]
    if set(normal) - {"NFC"}:
        raise _refuse(f"the tokenizer normalises text by {', '.join(normal)}")
    split: list[str] = []
    for step in _steps(data.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
            split.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step["individual_digits"]:
            split.append("digits")
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            split += ["bytes"] if step.get("use_regex", True) else []
        else:
            raise _refuse(f"the tokenizer splits text by {json.dumps(step)[:120]}")
    names = _SPLITS.get(tuple(split))
    whole = model.get("ignore_merges", False)
    name = None if names is None else names[1] if whole else names[0]
    if name is None:
        raise _refuse(f"the tokenizer splits text by {', '.join(split)[:120] or 'nothing'}")
    return name


def _steps(data: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Return the steps of a part of a tokenizer.json, of which a sequence has several."""
    if data is None:
        return []
    return [step for part in data[inner] for step in _steps(part, inner)] if data["type"] == "Sequence" else [data]


def _refuse(reason: str) -> UsageError:
    return UsageError(
        f"{reason}; vlm writes GGUF files of byte-level BPE tokenizers that split text as those of GPT-2, SmolLM, "
        "Llama 3 and Qwen do, and of BPE tokenizers with a fallback to bytes, as Llama 2's and Gemma's. Choose "
        "--format delta, or a language model with such a tokenizer."
    )
