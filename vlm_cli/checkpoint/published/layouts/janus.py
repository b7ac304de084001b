"""Janus (https://arxiv.org/abs/2410.13848), as Transformers writes it: the half that reads pictures.

The half that makes pictures has tensors of its own (`vqmodel`, `generation_…`), which a VLM does not have.

Sources: transformers/models/janus, `JanusForConditionalGeneration`, `JanusProcessor` and `JanusImageProcessor`.
"""

from __future__ import annotations

from typing import Any

from transformers import JanusConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig

from vlm_cli.checkpoint.published.announcing import read_named_tokens, read_processor
from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.deepseek_vl import describe_aligned_model, read_padded_parts
from vlm_cli.checkpoint.published.layouts.hf_grid import check_tokens_of_a_tile
from vlm_cli.checkpoint.published.layouts.hf_parts import MODEL
from vlm_cli.checkpoint.published.settings import Settings, check_settings_of
from vlm_cli.checkpoint.published.targets import Rule
from vlm_cli.errors import CheckpointError

__all__ = ["HuggingFaceJanus"]

_SETTINGS = Settings(
    config=JanusConfig,
    read={"vision_config", "text_config"},
    without_effect={"vq_config", "image_token_id", "tie_word_embeddings"},
)
_VISION = Settings(
    config=JanusVisionConfig,
    read={
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps"),
        *("mlp_ratio", "attention_bias", "use_qk_norm", "projection_dim", "depth"),
    },
    without_effect={
        *("attention_dropout", "hidden_dropout_rate", "projection_dropout", "initializer_range", "num_image_tokens"),
    },
    fixed={"hidden_act": ("gelu",), "num_channels": (3,)},
)
#: Settings of the processor -> Transformers' defaults.
_PROCESSOR = {"num_image_tokens": 576, "use_default_system_prompt": False}
_TOKENS = {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
_SYSTEM_PROMPT = (
    "Janus was trained with a system prompt before each prompt: 'You are a helpful language and vision assistant. You "
    "are able to understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language.', and an empty line. Begin prompts with it."
)


class HuggingFaceJanus:
    """`vision_model`, `aligner` and `language_model` beside a `vqmodel`, with a `config.json` of type `janus`."""

    name = "Janus (Hugging Face)"
    source = "transformers/models/janus/modeling_janus.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the aligner's first matrix and the configuration's type."""
        return checkpoint.config.get("model_type") == "janus" and any(
            name.endswith("aligner.fc1.weight") for name in checkpoint.tensors
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`, and the tokens around a picture from the tokenizer."""
        check_settings_of(checkpoint.name, "vision_config", checkpoint.config.get("vision_config") or {}, _VISION)
        parts = read_padded_parts(checkpoint, _SETTINGS)
        config: Any = parts.config
        vision, width = config.vision_config, config.text_config.hidden_size
        if vision.depth < 2 or vision.projection_dim != width:
            raise CheckpointError(
                f"{checkpoint.name!r} has an aligner of {vision.depth} maps and {vision.projection_dim} channels; vlm "
                f"builds only 2 maps or more, and the {width} channels of the language model."
            )
        texts = read_processor(checkpoint.folder, _PROCESSOR)
        check_tokens_of_a_tile(checkpoint, parts, 1, texts["num_image_tokens"])
        tokens = read_named_tokens(checkpoint.folder, _TOKENS)
        return describe_aligned_model(
            checkpoint,
            parts,
            rules=_list_aligner(vision.depth),
            map_depth=vision.depth,
            picture_text=f"{tokens['boi_token']}{{views}}{tokens['eoi_token']}",
            notes=(_SYSTEM_PROMPT,) if texts["use_default_system_prompt"] else (),
        )


def _list_aligner(depth: int) -> list[Rule]:
    """List the rules for an aligner of this many maps, between which the vision tokenizer counts activations."""
    names = ["fc1", *(f"hidden_layers.{i}" for i in range(depth - 1))]
    return [
        (rf"{MODEL}aligner\.{name}\.(\w+)", rf"vision_tokenizer.proj.{2 * i}.\1")
        for i, name in enumerate(x.replace(".", r"\.") for x in names)
    ]
