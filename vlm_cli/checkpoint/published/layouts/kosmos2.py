"""Kosmos-2 (https://arxiv.org/abs/2306.14824), as Transformers writes it.

Source: transformers/models/kosmos2.
"""

from __future__ import annotations

from typing import Any

from transformers import Kosmos2Config

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.hf_parts import read_parts
from vlm_cli.checkpoint.published.preprocessing import read_preprocessing
from vlm_cli.checkpoint.published.settings import Settings
from vlm_cli.checkpoint.published.targets import Rule, make_targets_of
from vlm_cli.composition import MEDIA_TOKEN

__all__ = ["Kosmos2"]

#: Kosmos-2's own `<image>` stands before a picture; vlm's stands for all of it.
_BEGIN = "<begin_of_image>"
_LIKE = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_RULES: list[Rule] = [
    (r"vision_model\.(.*)", r"vision_encoder.visual.\1"),
    (r"image_to_text_projection\.(.*)", r"vision_tokenizer.\1"),
    (r"text_model\.model\.embed_positions\.weights", None),  # computed
    (r"text_model\.(.*)", r"lang_model.\1"),
]


class Kosmos2:
    """`vision_model`, `image_to_text_projection` and `text_model`, with a `config.json` of type `kosmos-2`."""

    name = "Kosmos-2 (Hugging Face)"
    source = "transformers/models/kosmos2/modeling_kosmos2.py"
    settings = Settings(
        config=Kosmos2Config,
        read={"vision_config", "text_config", "latent_query_num"},
        without_effect={"tie_word_embeddings"},
    )

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the latents and the configuration's type."""
        return (
            checkpoint.config.get("model_type") == "kosmos-2"
            and "image_to_text_projection.latent_query" in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts.

        The last norm applies to every feature, the class token included.
        """
        parts = read_parts(checkpoint, self.settings, cuts=(), like=_LIKE)
        config: Any = parts.config
        # Pictures keep their shape, and their middle is cropped.
        pixels = read_preprocessing(checkpoint.folder, parts.vision_config["vision_cfg"]["image_size"])
        text = parts.text_config | {"tie_word_embeddings": "text_model.lm_head.weight" not in checkpoint.tensors}
        return CheckpointDescription(
            composition={
                "family": "kosmos",
                "vision_encoder": {"name": f"hf:{checkpoint.name}", "class_token": True, "norm": True},
                "vision_tokenizer": {
                    "type": "latent-attention",
                    "num_latents": checkpoint.shape("image_to_text_projection.latent_query")[0],
                    "num_heads": config.text_config.attention_heads,
                },
                "tiling": {"type": "none", "picture_text": f"{_BEGIN}{{views}}</image>"},
                "language_model": {"name": checkpoint.name},
                "added_tokens": [MEDIA_TOKEN],
                "trainable": ["vision_tokenizer", "added_tokens", "language_model"],
            },
            targets_for=lambda _: make_targets_of(_RULES),
            text_config=text,
            vision_config={**parts.vision_config, "preprocess": pixels},
            renamed_tokens={MEDIA_TOKEN: _BEGIN},
            starts_with_bos=True,
            optional_pattern=r"added_tokens\..*",
            notes=(f"Kosmos-2's own token {MEDIA_TOKEN} is {_BEGIN} here, and stands before each picture by itself.",),
        )
