"""Stop strings: new text alone ends an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from vlm_cli.generation.stopping import StopStrings


def spell(before: Sequence[int], ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def ends(criteria: Any, prompt: Sequence[str], new: Sequence[str]) -> list[int | None]:
    """Where each row ends: at which of its new characters."""
    found: list[int | None] = [None] * len(prompt)
    for n in range(1, len(new[0]) + 1):
        rows = [[ord(c) for c in a + b[:n]] for a, b in zip(prompt, new, strict=True)]
        for i, has_ended in enumerate(criteria(torch.tensor(rows), None).tolist()):
            if has_ended and found[i] is None:
                found[i] = n
    return found


@pytest.fixture(scope="module")
def characters() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="\0"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_the_end_of_the_prompt_does_not_count(characters: PreTrainedTokenizerFast) -> None:
    prompt, new = ["AA: EN", "A: END"], ["D. END", "xEN ND"]
    assert ends(StopStrings(spell, ["END"]), prompt, new) == [6, None]
    # The twin: Transformers' own criterion ends the first row at the prompt's half of the word.
    assert ends(StopStringCriteria(characters, ["END"]), prompt, new)[0] == 1


@pytest.mark.parametrize("stop", ["END", "D", "a long stop string of forty characters..", "é"])
def test_a_stop_string_is_found_wherever_it_ends(stop: str) -> None:
    for before in (0, 1, 200):
        text = "x" * before + stop
        assert ends(StopStrings(spell, ["zzz", stop]), ["prompt"], [text + "yy"]) == [len(text)]
