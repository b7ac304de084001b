"""IDEFICS as Transformers writes it, against Transformers' class with the image mask of its processor."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from tests.support.grid import first_of
from tests.support.idefics import END, FAKE, IMAGE, IMAGE_ID, PERCEIVER, config, huggingface
from tests.support.published import (
    SIZE,
    VOCABULARY,
    Case,
    check,
    load,
    prompt,
    rewrite,
    rewrite_config,
    shapes_of,
    sized,
)
from tests.support.swaps import check_swap, other_parts
from vlm_cli.composition import CompositionRequest
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.vlm import VLM


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "changes",
    first_of(
        [
            {},
            {"alpha_type": "vector"},
            {"qk_layer_norms": False},
            {"tie_word_embeddings": True},
            {"perceiver_config": {**PERCEIVER, "qk_layer_norms_perceiver": False}},
            {"cross_layer_interval": 1},
            {"num_added": 3},
        ],
        4,
    ),
    ids=str,
)
def test_huggingface(tmp_path, changes):
    check(huggingface(tmp_path, **changes), is_told=not changes)


@torch.no_grad()
def test_text_between_and_before_media(tmp_path):
    """Make IDEFICS's mask: each position sees the last image, and text before the first image sees none."""
    found = huggingface(tmp_path)
    imported = load(found)
    model, tokenizer = imported.model, imported.processor.tokenizer
    text = f"w5 w6 {FAKE} {IMAGE} {FAKE} w7 w8 {FAKE} {IMAGE} {IMAGE} {FAKE} w9 w10"
    lang_x = torch.tensor([tokenizer.convert_tokens_to_ids(text.split())])
    assert lang_x[0, 2:4].tolist() == [VOCABULARY, IMAGE_ID]
    vision_x = torch.randn(1, 3, 1, 3, SIZE, SIZE)
    ours = model(lang_x=lang_x, vision_x=vision_x).logits[0, :, :VOCABULARY]
    torch.testing.assert_close(ours, found.logits(lang_x, vision_x), atol=1e-4, rtol=0)


@pytest.mark.matrix
@torch.no_grad()
def test_built_directory(vlm, tmp_path):
    """A written directory loads as the same model."""
    found = huggingface(tmp_path / "published")
    result = vlm("build", tmp_path / "ours", "--from", tmp_path / "published")
    assert result.exit_code == 0, result.stderr
    imported, built = load(found).model, VLM.from_pretrained(tmp_path / "ours").eval()
    lang_x, vision_x = prompt(imported, 2)
    ours, theirs = (model(lang_x=lang_x, vision_x=vision_x).logits for model in (imported, built))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_added_tokens(tmp_path):
    """The ids after Llama's are the rows of the second tables, in order."""
    imported = load(huggingface(tmp_path, num_added=3))
    theirs = IdeficsForVisionText2Text.from_pretrained(tmp_path)
    tokenizer = imported.processor.tokenizer
    assert imported.model.config.added_tokens == [FAKE, IMAGE, END]
    assert tokenizer.convert_tokens_to_ids([FAKE, IMAGE, END]) == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    ours = imported.model.added_tokens
    assert torch.equal(ours.embedding.weight, theirs.model.embed_tokens.additional_embedding.weight)
    assert torch.equal(ours.head.weight, theirs.lm_head.additional_fc.weight)


@torch.no_grad()
def test_without_images(tmp_path):
    """vlm runs Llama alone. IDEFICS also runs the blocks' feed-forward layers: a known difference."""
    found = huggingface(tmp_path)
    imported = load(found)
    assert any("passes only Llama's layers" in note for note in imported.notes)
    model = imported.model
    lang_x = torch.randint(1, VOCABULARY, (1, 7))
    ours = model(lang_x=lang_x).logits[0, :, :VOCABULARY]
    theirs = found.logits(lang_x, torch.zeros(1, 1, 1, 3, SIZE, SIZE))
    assert float((ours - theirs).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "wrong",
    first_of(
        [
            "vision_encoder.norm=true",
            "fusion.attend=all",
            "vision_encoder.class_token=false",
            "vision_tokenizer.activation=gelu",
        ],
        2,
    ),
)
@torch.no_grad()
def test_another_reading_is_noticed(tmp_path, wrong):
    found = huggingface(tmp_path)
    models = [load(x).model for x in (found, replace(found, options=CompositionRequest(overrides=[wrong])))]
    lang_x, vision_x = prompt(models[0], 2)
    right, other = (model(lang_x=lang_x, vision_x=vision_x).logits for model in models)
    assert float((right - other).abs().max()) > 1e-3


def test_blocks_elsewhere_have_no_weights(tmp_path):
    """Flamingo has a block before the last layer of each interval, and IDEFICS before the first."""
    found = huggingface(tmp_path)
    imported = load(replace(found, options=CompositionRequest(overrides=["fusion.first=null"])))
    assert imported.model is None
    assert {name.split(".")[2] for name in imported.report.missing} == {"1", "3"}
    assert {name.split(".")[2] for name in imported.report.unused} == {"0", "1"}  # IDEFICS counts its blocks 0, 1, …


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"cross_layer_interval": 4},
            "has 2 cross-attention blocks, but cross_layer_interval=4 over 4 layers needs 1",
        ),
        ({"num_hidden_layers": 6}, "has 2 cross-attention blocks, but cross_layer_interval=2 over 6 layers needs 3"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ],
    ids=str,
)
def test_other_numbers_are_refused(tmp_path, changes, words):
    found = huggingface(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load(found)


def test_without_resampler_is_refused(tmp_path):
    IdeficsForVisionText2Text(config(use_resampler=False)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use_resampler=False"):
        load(Case(source=tmp_path, logits=lambda *_: _, made_by=""))


def test_other_tokens_are_refused(tmp_path):
    IdeficsForVisionText2Text(config(additional_vocab_size=5)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="adds 5 tokens to Llama's"):
        load(Case(source=tmp_path, logits=lambda *_: _, made_by=""))


def test_another_width_is_named(tmp_path):
    found = huggingface(tmp_path)
    name = "model.gated_cross_attn_layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: {**tensors, name: torch.zeros(47, 32)})
    report = load(found).report
    assert report.mismatched == {name: ([47, 32], [48, 32])}


def test_older_names(tmp_path):
    """Older releases of Transformers saved the frequencies of rotary positions."""
    found = huggingface(tmp_path)
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(4)}
    rewrite(tmp_path, lambda tensors: {**tensors, **more})
    check(found)


@pytest.mark.matrix
def test_published_sizes():
    """Sizes of https://huggingface.co/HuggingFaceM4/idefics-9b: ViT-H/14, Llama-7B, a block every 4 layers."""
    settings = IdeficsConfig(
        additional_vocab_size=2,
        cross_layer_interval=4,
        qk_layer_norms=True,
        use_resampler=True,
        vision_config={"embed_dim": 1280, "intermediate_size": 5120, "num_hidden_layers": 32},
        perceiver_config={"use_resampler": True, "qk_layer_norms_perceiver": True},
    )
    with torch.device("meta"):
        theirs = IdeficsForVisionText2Text(settings)
    model, report = sized(shapes_of(theirs))
    assert report.is_complete and not report.unused
    assert model.config.composition.vision_encoder.name == "ViT-H-14"
    assert list(model.fusion.blocks) == ["0", "4", "8", "12", "16", "20", "24", "28"]
    assert (model.config.vision_config["num_patches"], model.config.media_token_id) == (257, 32001)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    projection = model.vision_encoder.visual.proj.numel()
    assert count(model.vision_encoder) - projection == count(theirs.model.vision_model)
    assert count(model.vision_tokenizer) == count(theirs.model.perceiver_resampler)
    assert count(model.fusion) == count(theirs.model.gated_cross_attn_layers)
    assert count(model.lang_model) == 6_738_415_616  # Llama-7B
    assert count(model.added_tokens) == 2 * 2 * 4096
    assert sum(count(part) for part in model.part_modules().values()) - projection == count(theirs)


@pytest.mark.matrix
def test_another_language_model(tmp_path):
    (tmp_path / "idefics").mkdir()
    case, others = huggingface(tmp_path / "idefics"), other_parts(tmp_path)
    new = {"fusion", "added_tokens", "language_model"}
    check_swap(case.source, new, case.options, language_model=others["language_model"])
