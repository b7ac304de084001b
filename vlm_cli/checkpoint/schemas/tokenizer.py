"""The files of a tokenizer, which may ask for too much memory or write to the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlm_cli.checkpoint.inside import check_named_files
from vlm_cli.checkpoint.schemas.reading import read_file
from vlm_cli.checkpoint.schemas.values import MOST_CHANNELS
from vlm_cli.errors import CheckpointError
from vlm_cli.schema import ANYTHING, Kind, check, either, list_of, mapping, mapping_of, number, optional, show, text

__all__ = ["check_tokenizer"]

_TOKENIZER_CONFIG = mapping(
    {},
    {
        "model_max_length": optional(number(1, 1e31)),
        "added_tokens_decoder": optional(mapping_of(mapping({"content": text(most=10_000)}))),
        "chat_template": optional(either(text(most=10_000_000, empty=True), list_of(mapping_of(ANYTHING)))),
        "tokenizer_class": optional(text(most=200)),
        "padding_side": optional(text(most=10)),
    },
)


def _has_plain_keys(value: Any) -> bool:
    """Tell whether all keys in a value are printable: tokenizers prints the keys of a token that it does not know."""
    waiting = [value]
    while waiting:
        x = waiting.pop()
        if isinstance(x, Mapping):
            if not all(str(key).isprintable() for key in x):
                return False
            waiting.extend(x.values())
        elif isinstance(x, list):
            waiting.extend(x)
    return True


def _has_small_ids(vocabulary: Any) -> bool:
    """Tell whether a vocabulary gives no huge id: tokenizers reserves memory up to the largest one."""
    if isinstance(vocabulary, list):
        return len(vocabulary) <= MOST_CHANNELS
    return isinstance(vocabulary, Mapping) and all(
        type(x) is int and 0 <= x < MOST_CHANNELS for x in vocabulary.values()
    )


def _find_model_problems(model: Mapping[str, Any], key: str) -> Iterator[str]:
    """Find what makes tokenizers reserve too much, or panic: it cuts a prefix off the second half of each merge."""
    if "vocab" in model:
        yield from Kind(f"a vocabulary with ids below {MOST_CHANNELS:,}", _has_small_ids).find_problems(
            model["vocab"], f"{key}.vocab"
        )
    prefix, merges = model.get("continuing_subword_prefix") or "", model.get("merges")
    if not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges if prefix else ():
        second = merge.partition(" ")[2] if isinstance(merge, str) else merge[-1] if merge else ""
        if not str(second).startswith(prefix):
            yield f"{key}.merges holds {show(merge)}, whose second half does not begin with {show(prefix)}."
            return


_PLAIN_KEYS = Kind("a value whose keys are printable", _has_plain_keys)
_TOKENIZER = mapping(
    {},
    {
        "added_tokens": optional(_PLAIN_KEYS),
        "model": optional(Kind("a mapping of keys to values", lambda x: isinstance(x, Mapping), _find_model_problems)),
    },
)
_MOST_GROWTH = 64  # characters that a tokenizer may make of one; a space becomes a mark of one character


def check_tokenizer(name: str, **keywords: Any) -> None:
    """Check the files of a tokenizer in a directory or hub id.

    They may name no other files, bring no text to the terminal and no huge ids, and multiply no text: forty
    replacements that each double a text make gigabytes of a word.

    Raises:
        CheckpointError: naming file and key.
    """
    if (settings := read_file(name, "tokenizer_config.json", keywords)) is not None:
        where = f"tokenizer_config.json of {name!r}"
        check(settings, _TOKENIZER_CONFIG, where)
        check(settings, _PLAIN_KEYS, where)
        check_named_files(settings, where)
    if (special := read_file(name, "special_tokens_map.json", keywords)) is not None:
        check(special, _PLAIN_KEYS, f"special_tokens_map.json of {name!r}")
    data = read_file(name, "tokenizer.json", keywords)
    if data is None:
        return
    check(data, _TOKENIZER, f"tokenizer.json of {name!r}")
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(data.get(key))) > _MOST_GROWTH:
            raise CheckpointError(
                f"tokenizer.json of {name!r} is not valid: {key} makes up to {growth:.3g} characters of one; "
                f"{_MOST_GROWTH} are possible. Fetch it again, or give another tokenizer."
            )


def _growth(step: Any) -> float:
    """Return how many characters a step of a tokenizer, with the steps in it, makes of one at most."""
    if not isinstance(step, Mapping):
        return 1.0
    growth = 1.0
    for key in ("normalizers", "pretokenizers", "decoders"):
        for inner in step[key] if isinstance(step.get(key), list) else ():
            growth = min(growth * _growth(inner), 1e300)
    pattern, content = step.get("pattern"), step.get("content")
    if step.get("type") == "Replace" and isinstance(content, str):
        # A regular expression may match the empty text, before each character.
        text = pattern.get("String") if isinstance(pattern, Mapping) else None
        per_match = len(content) / max(1, len(text)) if isinstance(text, str) else len(content) + 1
        growth *= max(1.0, per_match)
    return growth
