"""The layout of a prompt: each text as it stands there."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import vlm_cli
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium, Text
from vlm_cli.report.layout import lay_out


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that marks spaces at the start of words, and writes none at the start of a text, as LLaMA's does."""
    pieces = ["<unk>", "▁", *"abc:."]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    found = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    found.add_tokens([AddedToken("<image>", special=False, normalized=False)])
    return found


def test_each_text_keeps_its_first_space(tokenizer: PreTrainedTokenizerFast) -> None:
    model, processor = vlm_cli.load("demo")
    parts = [Text("a:"), Medium("x.png"), Text(" b c"), Medium("y.png"), Text("."), Medium("z.png"), Text(" a")]
    found = lay_out(model, VLMProcessor(processor.image_processor, tokenizer), parts)
    assert [span.content for span in found.spans] == [x.text if isinstance(x, Text) else x.source for x in parts]
    # The twin: the tokenizer alone drops it.
    assert tokenizer.decode(tokenizer(" b c", add_special_tokens=False)["input_ids"]) == "b c"
