"""Video-LLaVA's pictures, against Transformers' class and processor."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
)
from transformers.models.video_llava.video_processing_video_llava import VideoLlavaVideoProcessor

from tests.support.grid_models import PATCH, TEXT, TILE, TOWER
from tests.support.published import VOCABULARY, rewrite, rewrite_config, write_tokenizer
from tests.support.tiled import TiledCase, check_tiled
from tests.support.tiny import stir
from vlm_cli.checkpoint.export.hf.write import export_hf
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError


def video_llava(
    folder: Path,
    *,
    is_tied: bool = False,
    shard: str = "5GB",
    images: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **changes: Any,
) -> TiledCase:
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER | {"projection_dim": 24} | (vision or {})),
        text_config=LlamaConfig(**TEXT, tie_word_embeddings=is_tied),
        tie_word_embeddings=is_tied,
        image_token_index=VOCABULARY,
        video_token_index=VOCABULARY + 1,
        **changes,
    )
    theirs = stir(VideoLlavaForConditionalGeneration(config), seed=6)
    theirs.save_pretrained(folder, max_shard_size=shard)
    strategy = config.vision_feature_select_strategy
    processor = VideoLlavaProcessor(
        VideoLlavaImageProcessor(**{"size": {"shortest_edge": TILE}, "crop_size": TILE} | (images or {})),
        VideoLlavaVideoProcessor(),
        write_tokenizer(folder, "<image>", "<video>", pad="<pad>"),
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
    )
    processor.save_pretrained(folder)
    reads = partial(processor, return_legacy_image_output=False)
    unused = sum("video_tower" in name for name in theirs.state_dict())
    return TiledCase(source=folder, model=theirs, processor=reads, unused=unused)


def test_a_photograph(tmp_path):
    """The quick case of the tests below."""
    imported = check_tiled(video_llava(tmp_path), ["4:1"], is_told=True)
    assert all("video_tower" in name for name in imported.report.unused)
    assert any("answers about clips are not those of the published model" in note for note in imported.notes)


@pytest.mark.matrix
def test_photographs_of_many_shapes(tmp_path):
    check_tiled(video_llava(tmp_path))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "changes",
    [
        {"is_tied": True},
        {"shard": "40KB"},
        {"vision_feature_layer": -1},
        {"vision_feature_layer": [3, -2]},
        {"vision_feature_select_strategy": "full"},
        {"multimodal_projector_bias": False},
        {"vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-3}},
        {"images": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}},
    ],
    ids=str,
)
def test_ways_to_write_it(tmp_path, changes):
    check_tiled(video_llava(tmp_path, **changes), ["3:2", "1:4"])
    assert ("shard" in changes) == (len([*tmp_path.glob("*.safetensors")]) > 1)


@pytest.mark.matrix
def test_the_names_of_later_releases(tmp_path):
    """Transformers 5.24 writes the names of its early releases; others write those of its modules."""
    case = video_llava(tmp_path)
    tensors = {name: x.clone() for name, x in case.model.state_dict().items()}
    assert "model.image_tower.embeddings.class_embedding" in tensors and "lm_head.weight" in tensors
    rewrite(tmp_path, lambda _: tensors)
    check_tiled(case, ["2:3"])


@pytest.mark.matrix
@pytest.mark.parametrize(
    "over",
    [
        {"vision_encoder": {"layer": -1}},
        {"vision_encoder": {"norm": True}},
        {"vision_tokenizer": {"activation": "relu"}},
    ],
    ids=str,
)
def test_another_setting_is_noticed(tmp_path, over):
    with pytest.raises(AssertionError):
        check_tiled(replace(video_llava(tmp_path), over=over), ["3:2"])


@pytest.mark.matrix
def test_the_tower_of_clips_would_be_noticed(tmp_path):
    case = video_llava(tmp_path)
    swapped = {"image_tower": "video_tower", "video_tower": "image_tower"}

    def swap(name: str) -> str:
        tower = next((x for x in swapped if x in name), None)
        return name if tower is None else name.replace(tower, swapped[tower])

    rewrite(tmp_path, lambda tensors: {swap(name): x for name, x in tensors.items()})
    with pytest.raises(AssertionError):
        check_tiled(case, ["3:2"])


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"projector_hidden_act": "relu"}, "builds only 'gelu'"),
        ({"vision_feature_layer": [-2, 0]}, r"layers \[-2, 0\]; its vision encoder has layers 1 to 3, or -3 to -1"),
    ],
)
def test_what_is_not_read(tmp_path, changes, words):
    video_llava(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words):
        import_checkpoint(tmp_path)


@pytest.mark.matrix
def test_the_half_for_pictures_is_exported_as_llava(tmp_path):
    imported = import_checkpoint(video_llava(tmp_path / "published").source)
    (tmp_path / "out").mkdir()
    report = export_hf(imported.model, imported.processor, tmp_path / "out")
    assert report["class"] == "LlavaForConditionalGeneration" and report["largest_difference"] <= 1e-4
    again = import_checkpoint(tmp_path / "out").model.state_dict()
    assert all(torch.equal(x, again[name]) for name, x in imported.model.state_dict().items())
