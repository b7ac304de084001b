"""ViP-LLaVA (https://arxiv.org/abs/2312.00784), as Transformers writes it: LLaVA-1.5 over five layers of a CLIP.

Source: transformers/models/vipllava, `VipLlavaForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import VipLlavaConfig

from vlm_cli.checkpoint.published.layouts.llava import HuggingFaceLLaVA
from vlm_cli.checkpoint.published.settings import Settings

__all__ = ["HuggingFaceViPLLaVA"]

#: The names of the layers' setting: that of early releases, which a file of today may still have, counts first.
_LAYERS = ("vision_feature_layers", "vision_feature_layer")


class HuggingFaceViPLLaVA(HuggingFaceLLaVA):
    """LLaVA's parts, with a norm of the concatenated layers, and a `config.json` of type `vipllava`."""

    name = "ViP-LLaVA (Hugging Face)"
    source = "transformers/models/vipllava/modeling_vipllava.py"
    model_type = "vipllava"
    settings = Settings(
        config=VipLlavaConfig,
        read={
            *("vision_config", "text_config", "image_token_index", "image_token_id", "projector_layernorm_eps"),
            *_LAYERS,
        },
        without_effect={"image_seq_length", "tie_word_embeddings", "ignore_index", "pad_token_id"},
        fixed={"projector_hidden_act": ("gelu",)},
    )

    def read_layers(self, config: Mapping[str, Any]) -> int | list[int]:
        """Return the layers whose features are projected, as Transformers counts them."""
        layers: int | list[int] = next((config[key] for key in _LAYERS if key in config), [-2, -5, -8, -11, 6])
        return layers

    def read_projector(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read the settings of the vision tokenizer."""
        return {"type": "mlp", "norm": "layer", "norm_eps": config.get("projector_layernorm_eps", 1e-5)}
