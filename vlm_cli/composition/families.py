"""Families: compositions with a name. A family is an entry of `FAMILIES` and nothing else."""

from __future__ import annotations

from typing import Any

from vlm_cli.composition.options import END_OF_CHUNK, MEDIA_TOKEN

__all__ = ["FAMILIES"]

#: Name -> composition. Sources of the numbers: OpenFlamingo-4B (https://github.com/mlfoundations/open_flamingo),
#: Kosmos-1 (https://arxiv.org/abs/2302.14045), BLIP-2 (https://arxiv.org/abs/2301.12597), LLaVA
#: (https://arxiv.org/abs/2304.08485). `trainable` and `weight_decay` follow the open_flamingo code base. For LLaVA they
#: follow LLaVA's own scripts: the entry is its first stage; the second stage also trains the language model.
FAMILIES: dict[str, dict[str, Any]] = {
    "flamingo": {
        "vision_encoder": {"name": "ViT-L-14", "pretrained": "openai"},
        "vision_tokenizer": {"type": "perceiver"},
        "fusion": {"type": "cross-attention"},
        "language_model": {"name": "togethercomputer/RedPajama-INCITE-Base-3B-v1"},
        "added_tokens": [END_OF_CHUNK, MEDIA_TOKEN],
        "trainable": ["vision_tokenizer", "fusion", "added_tokens"],
        "weight_decay": 0.1,
        "weight_decay_on": ["fusion"],
    },
    "kosmos": {
        "vision_encoder": {"name": "ViT-L-14", "pretrained": "openai"},
        "vision_tokenizer": {"type": "perceiver"},
        "fusion": {"type": "language-stream"},
        "language_model": {"name": "facebook/opt-1.3b"},
        "trainable": ["vision_tokenizer", "fusion", "added_tokens", "language_model"],
        "weight_decay": 0.01,
    },
    "blip": {
        "vision_encoder": {"name": "EVA01-g-14", "pretrained": "laion400m_s11b_b41k"},
        "vision_tokenizer": {"type": "qformer"},
        "fusion": {"type": "language-stream"},
        "language_model": {"name": "facebook/opt-2.7b"},
        "trainable": ["vision_tokenizer", "added_tokens"],
        "weight_decay": 0.05,
    },
    "llava": {
        "vision_encoder": {"name": "ViT-L-14", "pretrained": "openai"},
        "vision_tokenizer": {"type": "linear"},
        "fusion": {"type": "language-stream"},
        "language_model": {"name": "lmsys/vicuna-7b-v1.5"},
        "trainable": ["vision_tokenizer", "added_tokens"],
        "weight_decay": 0.0,
    },
}
