"""Gemma 3 and PaliGemma, against Transformers' classes and processors."""

from __future__ import annotations

import pytest
import torch

from tests.support.gemma import gemma3, paligemma, paligemma2
from tests.support.published import rewrite_config
from tests.support.tiled import check_tiled
from vlm_cli.checkpoint.export.hf.write import export_hf
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.fusion.language_stream import VLMWithLanguageStream

SIZE, PATCH = 56, 14
MADE = {"gemma3": gemma3, "paligemma": paligemma, "paligemma2": paligemma2}


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MADE)
def test_photographs_of_many_shapes(tmp_path, kind):
    check_tiled(MADE[kind](tmp_path), is_told=kind != "paligemma2")


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["gemma3", "paligemma"])
def test_a_photograph(tmp_path, kind):
    """The quick case of the tests around it."""
    imported = check_tiled(MADE[kind](tmp_path), ["3:2"])
    mask = imported.model.config.composition.fusion.options.mask
    assert mask == {"gemma3": "image", "paligemma": "prefix"}[kind]
    assert not imported.report.absent or kind == "gemma3"


@pytest.mark.matrix
@pytest.mark.parametrize("is_tied", [True, False])
@torch.no_grad()
def test_an_added_token_enters_at_the_scale_of_others(tmp_path, is_tied):
    """Gemma multiplies rows of its table; `<pad>` has a row behind the language model's own."""
    case = paligemma(tmp_path / "published", is_tied=is_tied)
    imported = import_checkpoint(case.source)
    model = imported.model
    check_text(case.model, model)
    model.added_tokens.embedding.weight[1] *= 3  # as after training
    with pytest.raises(AssertionError):
        check_text(case.model, model)
    (tmp_path / "out").mkdir()
    export_hf(model, imported.processor, tmp_path / "out")
    check_text(type(case.model).from_pretrained(tmp_path / "out").eval(), model)


def check_text(theirs, model):
    """Compare the logits of a text with `<pad>` in it."""
    pad, first = model.config.pad_token_id, model.config.first_added_id
    assert pad > first
    inputs = {"input_ids": torch.tensor([[5, pad, 7, pad]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    wanted = theirs(**inputs, token_type_ids=torch.zeros(1, 4, dtype=torch.long)).logits
    found = model(**inputs).logits
    for columns in (slice(first), slice(pad, pad + 1)):
        torch.testing.assert_close(found[..., columns], wanted[..., columns], atol=1e-4, rtol=0)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("changes", [{"is_tied": False}, {"shard": "40KB"}], ids=str)
def test_ways_to_write_it(tmp_path, kind, changes):
    check_tiled(MADE[kind](tmp_path, **changes), ["1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", MADE)
def test_a_causal_mask_would_be_wrong(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(VLMWithLanguageStream, "mask_call", lambda self, conditioning, kwargs: kwargs)
    with pytest.raises(AssertionError, match="3:2"):
        check_tiled(MADE[kind](tmp_path), ["3:2"])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("kind", "file", "changes", "words"),
    [
        ("gemma3", "config.json", {"mm_tokens_per_image": 9}, "9 tokens of 4 x 4 patches; vlm averages whole squares"),
        ("gemma3", "config.json", {"boi_token_index": 70000}, "no token 70000 in the files of its tokenizer"),
        ("gemma3", "preprocessor_config.json", {"do_pan_and_scan": True}, "sets do_pan_and_scan=true"),
    ],
)
def test_what_is_not_read(tmp_path, kind, file, changes, words):
    MADE[kind](tmp_path)
    rewrite_config(tmp_path, file, **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(tmp_path)
