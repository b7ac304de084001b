"""Qianfan-OCR: InternVL's parts, under the names of InternVL's first code.

Source: transformers/models/qianfan_ocr, `QianfanOCRForConditionalGeneration`, and transformers/conversion_mapping.py,
which renames the published tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.hf_parts import HFParts
from vlm_cli.checkpoint.published.layouts.internvl import HuggingFaceInternVL
from vlm_cli.checkpoint.published.targets import Rule, Target

__all__ = ["HuggingFaceQianfanOCR"]

_TOWER, _LAYER = "vision_encoder.visual.", r"vision_model\.encoder\.(layers\.\d+)\."
_RULES: list[Rule] = [
    (r"vision_model\.embeddings\.class_embedding", f"{_TOWER}embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", f"{_TOWER}embeddings.position_embeddings"),
    (r"vision_model\.embeddings\.patch_embedding\.(\w+)", rf"{_TOWER}embeddings.patch_embeddings.projection.\1"),
    (rf"{_LAYER}ls(\d)", rf"{_TOWER}\1.lambda_\2"),
    (rf"{_LAYER}attn\.proj\.(\w+)", rf"{_TOWER}\1.attention.projection_layer.\2"),
    (rf"{_LAYER}attn\.([qk]_norm\..*)", rf"{_TOWER}\1.attention.\2"),
    (rf"{_LAYER}norm1\.(\w+)", rf"{_TOWER}\1.layernorm_before.\2"),
    (rf"{_LAYER}norm2\.(\w+)", rf"{_TOWER}\1.layernorm_after.\2"),
    (rf"{_LAYER}(mlp\..*)", rf"{_TOWER}\1.\2"),
    # Transformers 5.24 writes the language model's layers so when it saves a model.
    (r"language_model\.model\.encoder\.(layers\..*)", r"lang_model.model.\1"),
    (r"mlp1\.0\.(\w+)", r"vision_tokenizer.norm.\1"),
    (r"mlp1\.1\.(\w+)", r"vision_tokenizer.proj.0.\1"),
    (r"mlp1\.3\.(\w+)", r"vision_tokenizer.proj.2.\1"),
]


class HuggingFaceQianfanOCR(HuggingFaceInternVL):
    """`vision_model`, `mlp1` and `language_model`, with a `config.json` of type `qianfan_ocr`."""

    name = "Qianfan-OCR (Hugging Face)"
    source = "transformers/models/qianfan_ocr/modeling_qianfan_ocr.py"
    clip_texts: Mapping[str, str] = {}  # it reads no clips
    # The placeholder is what chat templates write; vlm's is <image>.
    written: Mapping[str, Any] = {"image_seq_length": 256, "image_placeholder_token": "<image>"}

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the projector's first matrix and the configuration's type."""
        return checkpoint.config.get("model_type") == "qianfan_ocr" and "mlp1.1.weight" in checkpoint.tensors

    def read_parts(self, checkpoint: PublishedCheckpoint) -> HFParts:
        """Read the parts; the tower's queries, keys and values lie in one matrix."""
        parts = super().read_parts(checkpoint)
        width: int = parts.vision_config["config"]["hidden_size"]

        def split(match: re.Match[str]) -> list[Target]:
            return [
                Target(
                    f"{_TOWER}{match[1]}.attention.{x}_proj.{match[2]}", source_rows=slice(i * width, (i + 1) * width)
                )
                for i, x in enumerate("qkv")
            ]

        return replace(parts, rules=[(rf"{_LAYER}attn\.qkv\.(\w+)", split), *_RULES])
