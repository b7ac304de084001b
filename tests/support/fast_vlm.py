"""A tiny FastVLM of Transformers' own class, as a published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, LlavaProcessor, Qwen2Config, TimmWrapperConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.support.grid_models import TEXT
from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiled import TiledCase
from tests.support.tiny import stir

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
