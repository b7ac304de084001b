"""Janus, against Transformers' class and processor, where it reads pictures and answers in text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor, LlamaConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from tests.support.grid_models import PATCH, SQUARE, TEXT, TILE, TOWER
from tests.support.published import VOCABULARY, rewrite_config, write_tokenizer
from tests.support.tiled import TiledCase, check_tiled
from tests.support.tiny import stir
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError

TOKENS = {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_placeholder>"}
_VISION = {key: x for key, x in TOWER.items() if key != "intermediate_size"}
_MAKES_PICTURES = {
    "num_embeddings": 8,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "projection_dim": 32,
    "image_token_embed_dim": 32,
}


def janus(
    folder: Path, *, is_tied: bool = True, shard: str = "5GB", images: dict[str, Any] | None = None, **vision: Any
) -> TiledCase:
    config = JanusConfig(
        vision_config=JanusVisionConfig(**{**_VISION, "projection_dim": 32, "mlp_ratio": 2.0, **vision}),
        vq_config=JanusVQVAEConfig(**_MAKES_PICTURES),
        text_config=LlamaConfig(**TEXT, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        image_token_id=VOCABULARY + 2,
    )
    theirs = stir(JanusForConditionalGeneration(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    theirs.generation_config.eos_token_id = None  # Janus's own `generate` takes this one if it is given none
    pixels = JanusImageProcessorPil(size=SQUARE, **(images or {}))
    pixels.save_pretrained(folder)
    tokenizer = write_tokenizer(folder, *TOKENS.values(), pad="w0", named=TOKENS)
    processor = JanusProcessor(pixels, tokenizer, num_image_tokens=(TILE // PATCH) ** 2)
    processor.save_pretrained(folder)
    unused = sum(not name.startswith(_READS) for name in theirs.state_dict())
    return TiledCase(source=folder, model=theirs, processor=processor, placeholder=TOKENS["image_token"], unused=unused)


_READS = ("model.vision_model.", "model.aligner.", "model.language_model.", "lm_head.")


def test_a_photograph(tmp_path):
    """The quick case of the tests below."""
    report = check_tiled(janus(tmp_path), ["4:1"], is_told=True).report
    parts = {name.split(".")[1] for name in report.unused}
    assert parts == {"vqmodel", "generation_embeddings", "generation_aligner", "generation_head"}


@pytest.mark.matrix
def test_photographs_of_many_shapes(tmp_path):
    check_tiled(janus(tmp_path))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [
        {"is_tied": False},
        {"shard": "40KB"},
        {"depth": 3},
        {"use_qk_norm": True, "hidden_size": 32, "num_attention_heads": 1},
        {"attention_bias": False},
        {"images": {"min_size": 20}},
        {"images": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}},
    ],
    ids=str,
)
def test_ways_to_write_it(tmp_path, changes):
    check_tiled(janus(tmp_path, **changes), ["1:4", "3:2"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "over",
    [
        {"vision_tokenizer": {"activation": "relu"}},
        {"vision_encoder": {"layer": -2}},
        {"tiling": {"picture_text": "w3{views}<end_of_image>"}},
    ],
    ids=str,
)
def test_another_setting_is_noticed(tmp_path, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(janus(tmp_path), over=over), ["3:2"])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("processor_config.json", {"num_image_tokens": 9}, "has 16 vision tokens .* writes 9 placeholders"),
        ("preprocessor_config.json", {"do_pad": False}, "sets do_pad=false for its pictures"),
        ("config.json", {"vision_config": {"depth": 1, "image_size": 32}}, "an aligner of 1 maps"),
        ("config.json", {"vision_config": {"hidden_act": "relu"}}, "has vision_config.hidden_act='relu'; vlm builds"),
    ],
)
def test_what_is_not_read(tmp_path, file, changes, words):
    janus(tmp_path)
    rewrite_config(tmp_path, file, **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(tmp_path)


@pytest.mark.matrix
def test_the_system_prompt_is_told(tmp_path):
    janus(tmp_path)
    assert not any("system prompt" in note for note in import_checkpoint(tmp_path).notes)
    rewrite_config(tmp_path, "processor_config.json", use_default_system_prompt=True)
    assert any("system prompt" in note for note in import_checkpoint(tmp_path).notes)
