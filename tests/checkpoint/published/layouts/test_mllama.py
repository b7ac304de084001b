"""Mllama (Llama 3.2 Vision), against Transformers' class and processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from tests.support.photographs import photograph
from tests.support.published import VOCABULARY, rewrite, rewrite_config, write_tokenizer
from tests.support.tiled import TiledCase, check_tiled
from tests.support.tiny import stir
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError

TILE, PATCH = 56, 14
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 96,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "cross_attention_layers": [1, 4],
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "eos_token_id": 1,
}
GRID = {"type": "grid", "choose": "scale", "fit": "corner", "thumbnail": "none", "max_tiles": 4}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}


@torch.no_grad()
def mllama(folder: Path, *, shard: str = "5GB", text: dict[str, Any] | None = None, **vision: Any) -> TiledCase:
    config = MllamaConfig(
        vision_config={**VISION, **vision}, text_config={**TEXT, **(text or {})}, image_token_index=VOCABULARY
    )
    theirs = stir(MllamaForConditionalGeneration(config), seed=5)
    for name, parameter in theirs.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            parameter.fill_(0.6)
    theirs.save_pretrained(folder, max_shard_size=shard)
    tiles = theirs.config.vision_config.max_num_tiles
    images = MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=tiles)
    images.save_pretrained(folder)
    tokenizer = write_tokenizer(folder, "<|image|>", pad="w0")
    tokenizer.bos_token = "w5"  # the processor adds it where a prompt does not have it
    return TiledCase(source=folder, model=theirs, processor=MllamaProcessor(images, tokenizer), placeholder="<|image|>")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return mllama(tmp_path_factory.mktemp("mllama"))


def test_a_photograph(made):
    check_tiled(made, ["3:2"], is_told=True)


@pytest.mark.matrix
def test_photographs_of_many_shapes(tmp_path):
    check_tiled(mllama(tmp_path))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [
        {"shard": "40KB"},
        {"text": {"cross_attention_layers": [0, 3]}},
        {"text": {"cross_attention_layers": [2], "num_hidden_layers": 4}},
        {"text": {"num_key_value_heads": 4}},
        {"text": {"rope_parameters": LLAMA3_ROPE}},
        {"intermediate_layers_indices": [1, 2, 0], "vision_output_dim": 128},
        {"max_num_tiles": 3, "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [2, 1], [3, 1]]},
    ],
    ids=str,
)
def test_ways_to_write_it(tmp_path, changes):
    check_tiled(mllama(tmp_path, **changes), ["16:9", "tiny"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.matrix
def test_the_names_in_transformers_itself(tmp_path):
    """Files have the names of releases before 4.52; those of the modules are read too."""
    case = mllama(tmp_path)
    newer = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_model.": "model.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }

    def rename(name: str) -> str:
        start = next(x for x in newer if name.startswith(x))
        return newer[start] + name.removeprefix(start)

    rewrite(tmp_path, lambda tensors: {rename(name): x for name, x in tensors.items()})
    check_tiled(case, ["2:3"])


@pytest.mark.matrix
@pytest.mark.parametrize(
    "over",
    [
        {"fusion": {"attend_before_media": False}},
        {"fusion": {"feed_forward_before_media": True}},
        {"fusion": {"first": 0}},
        {"tiling": GRID | {"fit": "squash"}},
        {"tiling": GRID | {"choose": "shape"}},
        {"vision_encoder": {"class_token": False}},
    ],
    ids=str,
)
def test_another_setting_is_noticed(tmp_path, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(mllama(tmp_path), over=over), ["4:1", "3:2"])


@pytest.mark.matrix
@torch.no_grad()
def test_two_pictures_with_text_between(tmp_path):
    case = mllama(tmp_path)
    pictures = [photograph("3:2"), photograph("tiny")]
    theirs = case.processor(text="w5 <|image|> w6 w7 <|image|> w8 w9", images=pictures, return_tensors="pt")
    imported = import_checkpoint(tmp_path)
    ours = imported.processor(text="w5 <image> w6 w7 <image> w8 w9", images=pictures)
    expected = case.model(**theirs).logits[0]
    found = imported.model(**ours).logits[0, :, :VOCABULARY]
    assert float((found - expected).abs().max()) <= 1e-4
    swapped = dict(ours) | {key: ours[key].flip(1) for key in ("pixel_values", "vision_mask", "vision_grid")}
    other = imported.model(**swapped).logits[0, :, :VOCABULARY]
    assert float((other - expected).abs().max()) > 1e-3


@pytest.mark.matrix
@torch.no_grad()
def test_rows_of_a_batch_do_not_change_each_other(tmp_path):
    """Pictures of one and of four tiles, a row without a picture, and a picture twice."""
    mllama(tmp_path)
    imported = import_checkpoint(tmp_path)
    model, processor = imported.model, imported.processor
    shapes = [["3:2", "tiny"], ["4:1"], [], ["3:2"]]
    texts = [" ".join(["w5", *(f"<image> w{i}" for i in range(6, 6 + len(row))), "w9"]) for row in shapes]
    pictures = [[photograph(x) for x in row] for row in shapes]
    together = processor(text=texts, images=pictures)
    found = model(**together).logits
    for row, (text, media) in enumerate(zip(texts, pictures, strict=True)):
        alone = processor(text=text, images=media)
        expected = model(**alone).logits[0]
        assert float((found[row, -len(expected) :] - expected).abs().max()) <= 1e-4, row
    tokens, mask = model.encode_vision(*(together[x] for x in ("pixel_values", "vision_mask", "vision_grid")))
    assert torch.equal(tokens[0, 0], tokens[3, 0]) and mask.sum(-1).tolist() == [[68, 17], [68, 0], [0, 0], [68, 0]]


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (
            "config.json",
            {"text_config": {**TEXT, "cross_attention_layers": [1, 5]}},
            r"cross_attention_layers=\[1, 5\]",
        ),
        ("config.json", {"text_config": {**TEXT, "hidden_act": "gelu"}}, "hidden_act='gelu'; vlm builds only 'silu'"),
        ("preprocessor_config.json", {"max_image_tiles": 2}, "cuts all grids of at most 2 tiles"),
    ],
)
def test_what_is_not_read(made, file, changes, words):
    folder = made.source
    before = (folder / file).read_bytes()
    rewrite_config(folder, file, **changes)
    try:
        with pytest.raises(CheckpointError, match=words):
            import_checkpoint(folder)
    finally:
        (folder / file).write_bytes(before)


def test_more_views_than_the_encoder_reads(made):
    model = import_checkpoint(made.source).model
    with pytest.raises(ValueError, match="a medium has 5 views, and the vision encoder reads at most 4 together"):
        model.encode_vision(torch.zeros(1, 1, 5, 3, TILE, TILE))
    grid = torch.tensor([[[3, 3, 9, 9]]])
    with pytest.raises(ValueError, match=r"no embeddings for 3 x 3 tiles\. It knows 1 x 1, 1 x 2"):
        model.encode_vision(torch.zeros(1, 1, 4, 3, TILE, TILE), vision_grid=grid)
