"""Clips of LLaVA-NeXT-Video and LLaVA-OneVision, against Transformers' classes and processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.llava_next import (
    llava_next_video,
    llava_onevision,
)
from tests.support.photographs import photograph
from tests.support.published import VOCABULARY, rewrite_config
from tests.support.tiled import AFTER, BEFORE, TiledCase, check_tiled
from tests.support.tiny import nudged
from vlm_cli.checkpoint.published.importing import import_checkpoint
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.tiling import MediumSize

WORDS = slice(0, VOCABULARY)


MADE = {"llava_next_video": llava_next_video, "llava_onevision": llava_onevision}


@torch.no_grad()
def check_clips(case: TiledCase, num_frames: int) -> None:
    """Compare positions, pixels, logits and greedy tokens for one clip, and for a clip beside a picture."""
    imported = import_checkpoint(case.source)
    model, processor = imported.model, imported.processor
    assert model is not None and not imported.report.unused
    frames = [photograph("3:2").rotate(12 * i).resize((90, 60)) for i in range(num_frames)]
    picture = photograph("1:1")
    for text, pictures in ((f"{BEFORE} <video> {AFTER}", []), (f"<image> {BEFORE} <video> {AFTER}", [picture])):
        clip = np.stack([np.asarray(frame) for frame in frames])
        theirs = dict(case.processor(text=text, videos=[clip], images=pictures or None, return_tensors="pt"))
        theirs = {key: x for key, x in theirs.items() if key not in ("mm_token_type_ids", "token_type_ids")}
        ours = processor(text=text, images=[*pictures, frames])
        pixels = ours["pixel_values"][0, len(pictures), :num_frames]
        # Transformers resizes clips by torch, which rounds other than Pillow: 1 of 255, by their deviation.
        torch.testing.assert_close(pixels, theirs["pixel_values_videos"][0], atol=1.6 / 255 / 0.26, rtol=0)
        theirs["pixel_values_videos"] = pixels[None]
        sizes = [*(processor.image_processor.measure(*x.size) for x in pictures), MediumSize(num_frames)]
        positions = ContextBudget.of(model).positions(ours["input_ids"].shape[1], sizes)
        assert positions == theirs["input_ids"].shape[1]
        last = [-4, -3, -2, -1]
        expected = case.model(**theirs).logits[0, last, WORDS]
        found = model(**ours).logits[0, last, WORDS]
        assert float((found - expected).abs().max()) <= 1e-4
        assert (
            float((model(**ours | {"pixel_values": -ours["pixel_values"]}).logits[0, last, WORDS] - found).abs().max())
            > 1e-3
        )
        with nudged(next(model.vision_tokenizer.parameters())):
            assert float((model(**ours).logits[0, last, WORDS] - found).abs().max()) > 1e-3
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        rows = [*range(VOCABULARY, case.model.get_output_embeddings().weight.shape[0])]
        added = [*range(VOCABULARY, model.config.first_added_id + model.added_tokens.num_tokens)]
        answer = case.model.generate(**theirs, **options, suppress_tokens=rows)[0, -4:]
        assert torch.equal(model.generate(**ours, **options, suppress_tokens=added)[0, -4:], answer)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", MADE)
def test_clips_of_published_models(tmp_path: Path, kind: str) -> None:
    check_clips(MADE[kind](tmp_path), 3)


@pytest.mark.matrix
def test_pictures_of_llava_next_video(tmp_path: Path) -> None:
    check_tiled(llava_next_video(tmp_path), is_told=True)


@pytest.mark.matrix
@pytest.mark.parametrize("changes", [{"is_tied": True}, {"shard": "40KB"}, {"vision_feature_layer": -1}], ids=str)
def test_ways_to_write_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    check_clips(llava_next_video(tmp_path, **changes), 2)


def test_another_pooling_is_refused(tmp_path: Path) -> None:
    llava_next_video(tmp_path)
    rewrite_config(tmp_path, spatial_pool_mode="max")
    with pytest.raises(CheckpointError, match="spatial_pool_mode"):
        import_checkpoint(tmp_path)
