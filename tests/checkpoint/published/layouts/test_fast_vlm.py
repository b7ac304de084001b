"""FastVLM, against Transformers' class and processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, LlavaProcessor, Qwen2Config, TimmWrapperConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.support.grid_models import TEXT
from tests.support.published import VOCABULARY, rewrite_config, write_tokenizer
from tests.support.tiled import TiledCase, check_tiled
from tests.support.tiny import stir
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import VLMError

SIDE, STRIDE = 64, 32


@torch.no_grad()
def fast_vlm(
    folder: Path, *, is_tied: bool = False, is_merged: bool = True, shard: str = "50MB", **changes: Any
) -> TiledCase:
    arguments = {"model_args": {"inference_mode": True}} if is_merged else {}
    config = FastVlmConfig(
        vision_config=TimmWrapperConfig(architecture="fastvit_t8", hidden_size=768, do_pooling=True, **arguments),
        text_config=Qwen2Config(**TEXT, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        image_token_index=VOCABULARY,
        image_seq_length=(SIDE // STRIDE) ** 2,
        **changes,
    )
    theirs = stir(FastVlmForConditionalGeneration(config), 0.02, seed=5)
    for parameter in theirs.model.vision_tower.parameters():
        if parameter.ndim == 4:  # convolutions that keep the scale of their input, so that images matter
            parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=SIDE, image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0]
        ),
        write_tokenizer(folder, "<image>", pad="<pad>"),
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
    )
    processor.save_pretrained(folder)
    return TiledCase(source=folder, model=theirs, processor=processor)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return fast_vlm(tmp_path_factory.mktemp("fast_vlm"))


@pytest.mark.matrix
def test_a_photograph(made):
    check_tiled(made, ["3:2"], is_told=True)


@pytest.mark.matrix
def test_photographs_of_many_shapes(made):
    check_tiled(made)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [{"is_tied": True}, {"is_merged": False}, {"shard": "2MB"}, {"multimodal_projector_bias": False}],
    ids=str,
)
def test_ways_to_write_it(tmp_path, changes):
    check_tiled(fast_vlm(tmp_path, **changes), ["1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.matrix
@pytest.mark.parametrize("over", [{"vision_tokenizer": {"activation": "relu"}}, {"vision_tokenizer": {"scale": 1.5}}])
def test_another_setting_is_noticed(made, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(made, over=over), ["3:2"])


def test_what_is_not_read(made):
    """An argument could make timm read a file."""
    config = made.source / "config.json"
    before = config.read_bytes()
    changed = {"model_type": "timm_wrapper", "architecture": "fastvit_t8", "model_args": {"checkpoint_path": "x.pth"}}
    try:
        for vision, words in (
            (changed, "would give timm's model checkpoint_path, and vlm gives it only sizes"),
            (
                {**changed, "model_args": None, "architecture": "hf-hub:a/b"},
                "may only be a name that timm itself has, but is 'hf-hub:a/b'",
            ),
        ):
            rewrite_config(made.source, vision_config=vision)
            with pytest.raises(VLMError, match=words):
                import_checkpoint(made.source)
    finally:
        config.write_bytes(before)
