"""A tiny IDEFICS of Transformers' own class, as a published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

from tests.support.published import SIZE, VOCABULARY, Case, write_tokenizer
from tests.support.tiny import stir

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
IMAGE_ID = VOCABULARY + 1

VISION = {
    "embed_dim": 32,
    "image_size": SIZE,
    "patch_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PERCEIVER = {
    "use_resampler": True,
    "resampler_n_latents": 3,
    "resampler_depth": 2,
    "resampler_n_heads": 2,
    "resampler_head_dim": 8,
    "qk_layer_norms_perceiver": True,
}


def config(**changes: Any) -> IdeficsConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "additional_vocab_size": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 2,
        "qk_layer_norms": True,
        "use_resampler": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "vision_config": VISION,
        "perceiver_config": PERCEIVER,
    }
    return IdeficsConfig(**{**sizes, **changes})


@torch.no_grad()
def huggingface(folder: Path, *, num_added: int = 2, bos: str | None = None, **changes: Any) -> Case:
    theirs = stir(IdeficsForVisionText2Text(config(additional_vocab_size=num_added, **changes)), seed=5)
    for block in theirs.model.gated_cross_attn_layers:
        for gate in (block.alpha_cross_attn, block.alpha_dense):
            gate.copy_(0.7 + 0.2 * torch.randn_like(gate))
    theirs.save_pretrained(folder)
    tokenizer = write_tokenizer(folder, *(FAKE, IMAGE, END)[:num_added], pad="w0")
    if bos is not None:
        tokenizer.add_special_tokens({"bos_token": bos})
        IdeficsProcessor(IdeficsImageProcessorPil(image_size=SIZE), tokenizer).save_pretrained(folder)

    @torch.no_grad()
    def logits(lang_x: Tensor, vision_x: Tensor) -> Tensor:
        seen, _ = image_attention_mask_for_packed_input_ids(lang_x, tokenizer, "pt")
        mask = incremental_to_binary_attention_mask(seen, "pt", num_classes=vision_x.shape[1])
        pixels = vision_x[:, :, 0]
        return theirs(input_ids=lang_x, pixel_values=pixels, image_attention_mask=mask).logits[0, :, :VOCABULARY]

    return Case(source=folder, logits=logits, made_by="Transformers' IdeficsForVisionText2Text")
