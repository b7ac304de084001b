"""The text of --lora as settings of an adapter."""

from __future__ import annotations

import pytest

from vlm_cli.composition.adapters import AdapterSettings, parse_adapter, parse_adapters
from vlm_cli.errors import UsageError


def test_a_text_is_read() -> None:
    text = "language-model: r=4, alpha=6,targets=q_proj+v_proj,dropout=0.1,dora=false,rslora"
    wanted = AdapterSettings(r=4, alpha=6.0, targets=("q_proj", "v_proj"), dropout=0.1, rslora=True)
    assert parse_adapter(text) == ("language_model", wanted)
    assert parse_adapter("fusion:targets=all") == parse_adapter("fusion") == ("fusion", AdapterSettings())
    assert AdapterSettings(r=4).scale == 8.0 and wanted.scale == 6.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("language_modle", "Did you mean 'language_model'"),
        ("added_tokens", "Train it whole: --trainable added_tokens"),
        ("fusion:rank=4", "unknown setting 'rank'.*Known: r, alpha, targets"),
        ("fusion:r=0", "r must be a whole number from 1"),
        ("fusion:r=1.5", "r in .* must be a whole number, got '1.5'"),
        ("fusion:alpha=0", "alpha must be above 0"),
        ("fusion:alpha=nan", "alpha must be above 0"),
        ("fusion:dropout=1", "dropout must be from 0 to below 1"),
        ("fusion:dora=perhaps", "dora in .* must be true or false"),
        ("fusion:targets=", "must be all, or names of layers"),
        ("fusion:r=1,r=2", "gives r twice"),
        ("fusion:trainable_token_indices=5", "--trainable added_tokens"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_adapter(text)


def test_a_part_has_one_adapter_and_does_not_train_whole() -> None:
    assert list(parse_adapters(["fusion", "language_model:r=1"], ("vision_tokenizer",))) == ["fusion", "language_model"]
    with pytest.raises(UsageError, match="twice for fusion"):
        parse_adapters(["fusion", "fusion:r=1"])
    with pytest.raises(UsageError, match="--trainable vision_tokenizer"):
        parse_adapters(["fusion"], ("vision_tokenizer", "fusion"))
    with pytest.raises(UsageError, match="--trainable none"):
        parse_adapters(["fusion"], ("fusion",))
