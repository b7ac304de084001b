"""A tiny LLaVA-1.5 of Transformers' own class, as a published checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from tests.support.published import SIZE, VOCABULARY, Case, write_tokenizer
from tests.support.tiny import stir

IMAGE = VOCABULARY


def config(*, is_tied: bool = False, vision: PreTrainedConfig | None = None, **changes: object) -> LlavaConfig:
    vision = vision or CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=16,
        projection_dim=24,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY + 8,  # rows are padded
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=is_tied,
    )
    return LlavaConfig(
        tie_word_embeddings=is_tied,
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=4,
        **changes,
    )


def huggingface(folder: Path, **changes: object) -> Case:
    theirs = stir(LlavaForConditionalGeneration(config(**changes)), seed=5)
    theirs.save_pretrained(folder)
    write_tokenizer(folder, "<image>", pad="<pad>")

    @torch.no_grad()
    def logits(lang_x: Tensor, vision_x: Tensor) -> Tensor:
        pixels = vision_x[0, :, 0]
        has_class_token = isinstance(theirs.config.vision_config, CLIPVisionConfig)
        per_image = 5 if has_class_token and changes.get("vision_feature_select_strategy") == "full" else 4
        counts = torch.where(lang_x[0] == IMAGE, per_image, 1)
        ids = lang_x[0].repeat_interleave(counts)[None]
        return theirs(input_ids=ids, pixel_values=pixels).logits[0, counts.cumsum(0) - 1, :VOCABULARY]

    return Case(source=folder, logits=logits, made_by="Transformers' LlavaForConditionalGeneration")
