"""Kosmos-2, against Transformers' class and processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.support.photographs import PHOTOGRAPHS, photograph
from tests.support.published import VOCABULARY, tell, write_tokenizer
from tests.support.tiny import nudged, stir
from vlm_cli.checkpoint.published.importing import Imported, import_checkpoint
from vlm_cli.doctor import check_invariants
from vlm_cli.modeling.budget import ContextBudget

SIZE, LATENTS = 56, 3
_SIZES = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 14,
    },
    "text_config": {
        "vocab_size": VOCABULARY + 64,
        "embed_dim": 32,
        "layers": 2,
        "ffn_dim": 48,
        "attention_heads": 4,
        "init_std": 0.2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "max_position_embeddings": 64,
        "bos_token_id": VOCABULARY,
        "pad_token_id": 1,
    },
}


def kosmos2(folder: Path, *, is_tied: bool = True, shard: str = "5GB") -> tuple[Any, Any]:
    text = {**_SIZES["text_config"], "tie_word_embeddings": is_tied}
    config = Kosmos2Config(
        vision_config=_SIZES["vision_config"],
        text_config=text,
        latent_query_num=LATENTS,
        tie_word_embeddings=is_tied,
    )
    theirs = stir(Kosmos2ForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    images.save_pretrained(folder)
    write_tokenizer(folder, "<s>", "<image>", "</image>", pad="w1")
    tokens = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="<s>")
    tokens.save_pretrained(folder)
    return theirs, Kosmos2Processor(images, tokens)


@torch.no_grad()
def check(folder: Path, shapes: list[str], **changes: Any) -> Imported:
    theirs, processor = kosmos2(folder, **changes)
    imported = import_checkpoint(folder)
    model, report = imported.model, imported.report
    assert model is not None and not report.unused, report
    images, added = imported.processor.image_processor, [*range(VOCABULARY, VOCABULARY + 8)]
    for shape in shapes:
        picture = photograph(shape)
        inputs = processor(
            text="w7 w8 w9", images=[picture], return_tensors="pt", num_image_tokens=LATENTS, first_image_token_id=2
        )
        ours = imported.processor(text="<image> w7 w8 w9", images=[picture])
        torch.testing.assert_close(ours["pixel_values"][0, 0], inputs["pixel_values"], atol=2e-6, rtol=0)
        positions = ContextBudget.of(model).positions(ours["input_ids"].shape[1], [images.measure(*picture.size)])
        assert positions == inputs["input_ids"].shape[1] == 1 + 1 + LATENTS + 1 + 3
        expected = theirs(**inputs).logits[0, [0, -4, -3, -2, -1], :VOCABULARY]
        found = model(**ours).logits[0, :, :VOCABULARY]
        assert float((found - expected).abs().max()) <= 1e-4, shape
        with nudged(model.vision_tokenizer.latent_query):
            assert float((model(**ours).logits[0, :, :VOCABULARY] - expected).abs().max()) > 1e-3
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        rows = [*range(VOCABULARY, VOCABULARY + 64)]
        answer = theirs.generate(**inputs, **options, suppress_tokens=rows)[0, -4:]
        assert torch.equal(model.generate(**ours, **options, suppress_tokens=added)[0, -4:], answer)
    return imported


def test_a_photograph(tmp_path):
    """The quick case of the tests below."""
    imported = check(tmp_path, ["3:2"])
    tokenizer = imported.processor.tokenizer
    assert tokenizer.convert_tokens_to_ids("<begin_of_image>") == VOCABULARY + 1
    assert tokenizer.convert_tokens_to_ids("<image>") > VOCABULARY + 2


@pytest.mark.matrix
def test_padding_has_no_position(tmp_path):
    """Transformers' own model counts padding once it has a cache."""
    kosmos2(tmp_path)
    model = import_checkpoint(tmp_path).model
    assert {f.name: f.verdict for f in check_invariants(model) if f.verdict != "holds"} == {}


@pytest.mark.matrix
def test_photographs_of_many_shapes(tmp_path):
    imported = check(tmp_path, list(PHOTOGRAPHS))
    counts = [len(x) for x in (imported.report.loaded, imported.report.absent, imported.report.unused)]
    name = imported.layout.name
    tell(f"| {name} | Transformers' Kosmos2ForConditionalGeneration | {' | '.join(map(str, counts))} | ✓ | ✓ |")


@pytest.mark.matrix
@pytest.mark.parametrize("changes", [{"is_tied": False}, {"shard": "40KB"}], ids=str)
def test_ways_to_write_it(tmp_path, changes):
    check(tmp_path, ["1:4"], **changes)
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)
