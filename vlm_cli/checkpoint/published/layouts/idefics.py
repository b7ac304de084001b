"""IDEFICS (https://arxiv.org/abs/2306.16527) as Transformers writes it.

Source: transformers/models/idefics, `IdeficsForVisionText2Text`: modeling_idefics.py, perceiver.py, vision.py and
processing_idefics.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import IdeficsConfig
from transformers.models.idefics.configuration_idefics import IdeficsPerceiverConfig, IdeficsVisionConfig

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.preprocessing import read_preprocessing
from vlm_cli.checkpoint.published.settings import Settings, check_settings_of
from vlm_cli.checkpoint.published.shapes import count_layers
from vlm_cli.checkpoint.published.tables import added_targets, tables_filled
from vlm_cli.checkpoint.published.targets import (
    Rule,
    Target,
    TargetsOf,
    TargetsOfMatch,
    identity,
    make_targets_of,
    stack_rows,
)
from vlm_cli.checkpoint.published.towers.clip import (
    CLIP_OPTIONAL,
    convert_clip_config,
    make_clip_rules,
    name_clip_tower,
)
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["ADDED_TOKENS", "LLAMA_SETTINGS", "HuggingFaceIDEFICS"]

#: Added tokens in the order of their ids; only instructed models have the last.
ADDED_TOKENS = ("<fake_token_around_image>", MEDIA_TOKEN, "<end_of_utterance>")

_NOTES = (
    f"IDEFICS was trained with {ADDED_TOKENS[0]} before and after each image, and a single one between two "
    "images that follow each other. vlm takes a prompt as you write it: write these tokens, and add "
    "--special-tokens.",
    "In vlm, a prompt without images passes only Llama's layers. In IDEFICS it passes the feed-forward "
    "layers of the cross-attention blocks too.",
)

_PERCEIVER = "model.perceiver_resampler."
_BLOCKS = "model.gated_cross_attn_layers."


class HuggingFaceIDEFICS:
    """`model.vision_model`, `model.perceiver_resampler`, `model.gated_cross_attn_layers`, and Llama's layers."""

    name = "IDEFICS (Hugging Face)"
    source = "transformers/models/idefics/modeling_idefics.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for a block's gate and the configuration's type."""
        return checkpoint.config.get("model_type") == "idefics" and f"{_BLOCKS}0.alpha_cross_attn" in checkpoint.tensors

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from `config.json`: the checkpoint holds all parts."""
        for part, settings in _SETTINGS.items():
            check_settings_of(
                checkpoint.name, part, checkpoint.config.get(part) or {} if part else checkpoint.config, settings
            )
        config = {**_DEFAULTS, **checkpoint.config}
        vision = {**_VISION_DEFAULTS, **config.get("vision_config", {})}
        vision["hidden_size"] = vision["embed_dim"]
        tower = convert_clip_config(vision, checkpoint.folder)
        tower["preprocess"] = read_preprocessing(checkpoint.folder, vision["image_size"], resize_mode="squash")
        if config["hidden_act"] != "silu":
            raise CheckpointError(
                f"{checkpoint.name!r} has activation {config['hidden_act']!r}; Llama's layers have silu."
            )
        every = _read_interval(checkpoint, config)
        added = checkpoint.tensors.get("model.embed_tokens.additional_embedding.weight")
        num_added = 0 if added is None else added.shape[0]
        if not 2 <= num_added <= len(ADDED_TOKENS):
            raise CheckpointError(
                f"{checkpoint.name!r} adds {num_added} tokens to Llama's; IDEFICS adds "
                f"{' and '.join(ADDED_TOKENS[:2])}, and an instructed model {ADDED_TOKENS[2]} too."
            )
        return CheckpointDescription(
            composition={
                "family": "flamingo",
                "vision_encoder": {"name": name_clip_tower(vision), "norm": False, "class_token": True},
                "vision_tokenizer": _read_perceiver(checkpoint, config),
                "fusion": _read_fusion(checkpoint, config, every),
                "language_model": {"name": checkpoint.name},
                "added_tokens": list(ADDED_TOKENS[:num_added]),
            },
            targets_for=lambda ours: _make_targets(checkpoint, ours, vision["hidden_size"], every),
            text_config={
                "model_type": "llama",
                "num_key_value_heads": config["num_attention_heads"],
                **{name: config[name] for name in LLAMA_SETTINGS if name in config},
            },
            vision_config=tower,
            first_added_id=config["vocab_size"],
            optional_pattern=CLIP_OPTIONAL,
            notes=_NOTES,
        )


#: Defaults of `config.json` (`IdeficsConfig`).
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "cross_layer_interval": 1,
    "use_resampler": False,
}
#: Settings that Llama has under the same names.
LLAMA_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_theta",
    "initializer_range",
)
#: Defaults of `vision_config` (`IdeficsVisionConfig`).
_VISION_DEFAULTS: Mapping[str, Any] = {
    "embed_dim": 768,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}


#: Part of the configuration -> what becomes of its settings. Names and shapes tell what is not read.
_SETTINGS = {
    "": Settings(
        config=IdeficsConfig,
        read={*_DEFAULTS, *LLAMA_SETTINGS, "vision_config", "perceiver_config"},
        without_effect={
            *("additional_vocab_size", "dropout", "alpha_initializer", "alphas_initializer_range", "alpha_type"),
            *("qk_layer_norms", "use_cache", "freeze_text_layers", "freeze_text_module_exceptions", "freeze_lm_head"),
            *("freeze_vision_layers", "freeze_vision_module_exceptions"),
        },
    ),
    "vision_config": Settings(
        config=IdeficsVisionConfig,
        read={*_VISION_DEFAULTS, "layer_norm_eps"},
        without_effect={"attention_dropout", "initializer_range", "initializer_factor"},
        fixed={"num_channels": (3,)},
    ),
    "perceiver_config": Settings(
        config=IdeficsPerceiverConfig,
        read={"resampler_n_latents", "resampler_depth", "resampler_n_heads", "resampler_head_dim", "use_resampler"},
        without_effect={"qk_layer_norms_perceiver"},
    ),
}


def _read_interval(checkpoint: PublishedCheckpoint, config: Mapping[str, Any]) -> int:
    """Return the number of decoder layers from one block to the next. The blocks are numbered by themselves.

    Raises:
        CheckpointError: if the checkpoint has another number of blocks than its configuration says.
    """
    every, depth = config["cross_layer_interval"], config["num_hidden_layers"]
    found = count_layers(checkpoint, rf"{re.escape(_BLOCKS)}(\d+)\.")
    if found * every != depth:
        raise CheckpointError(
            f"{checkpoint.name!r} has {found} cross-attention blocks, but cross_layer_interval={every} over {depth} "
            f"layers needs {depth / every:g}."
        )
    return every


def _read_fusion(checkpoint: PublishedCheckpoint, config: Mapping[str, Any], every: int) -> dict[str, Any]:
    """Read the settings of the cross-attention blocks; names and shapes tell what `config.json` does not."""
    return {
        "type": "llama-cross-attention",
        "every": every,
        "first": 0,
        "num_heads": config["num_attention_heads"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "dim_ff": config["intermediate_size"],
        "qk_norm": f"{_BLOCKS}0.cross_attn.q_layer_norm.weight" in checkpoint.tensors,
        "gate": "scalar" if checkpoint.shape(f"{_BLOCKS}0.alpha_dense") == (1,) else "vector",
        "norm_eps": config["rms_norm_eps"],
    }


def _read_perceiver(checkpoint: PublishedCheckpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings of the resampler, whose heads `config.json` or a norm of queries tells.

    Raises:
        CheckpointError: if there is no resampler, or its heads do not fit its channels.
    """
    if f"{_PERCEIVER}latents" not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.name!r} has no resampler (use_resampler={config['use_resampler']!r}), so it attends to all "
            "patches; vlm has no vision tokenizer that passes patches on unchanged."
        )
    norm = checkpoint.tensors.get(f"{_PERCEIVER}blocks.0.0.q_layer_norm.weight")
    head_dim = config.get("perceiver_config", {}).get("resampler_head_dim", 96) if norm is None else norm.shape[0]
    num_latents, dim = checkpoint.shape(f"{_PERCEIVER}latents")
    inner = checkpoint.shape(f"{_PERCEIVER}blocks.0.0.q_proj.weight")[0]
    if inner % head_dim:
        raise CheckpointError(
            f"{checkpoint.name!r} has a resampler with attention of {inner} channels, which is not a multiple of the "
            f"{head_dim} channels of a head."
        )
    return {
        "type": "perceiver",
        "depth": count_layers(checkpoint, rf"{re.escape(_PERCEIVER)}blocks\.(\d+)\."),
        "num_latents": num_latents,
        "num_heads": inner // head_dim,
        "head_dim": head_dim,
        "ff_mult": checkpoint.shape(f"{_PERCEIVER}blocks.0.1.fc.weight")[0] // dim,
        "activation": "relu",
        "qk_norm": norm is not None,
    }


def _make_targets(checkpoint: PublishedCheckpoint, ours: VLMConfig, vision_width: int, every: int) -> TargetsOf:
    """Make the lookup of targets for a VLM of this configuration.

    Args:
        checkpoint: names and shapes.
        ours: the VLM's configuration.
        vision_width: channels of the vision encoder.
        every: decoder layers from one block to the next.
    """
    filled = tables_filled(checkpoint, ours, embedding=r"model\.embed_tokens\.weight", head=r"lm_head\.weight")
    return make_targets_of(
        [
            *make_clip_rules(r"model\.vision_model\.", vision_width),
            *_make_resampler_rules(checkpoint.shape(f"{_PERCEIVER}blocks.0.0.k_proj.weight")[0]),
            *_make_block_rules(every),
            (r"model\..*\.rotary_emb\.inv_freq", None),  # computed from the configuration
            (r"model\.embed_tokens\.additional_embedding\.weight", lambda _: added_targets(filled["embedding"])),
            (r"model\.embed_tokens\.weight", "lang_model.model.embed_tokens.weight"),
            (r"model\.(layers\..*|norm\..*)", r"lang_model.model.\1"),
            (r"lm_head\.additional_fc\.weight", lambda _: added_targets(filled["head"])),
            (r"lm_head\.weight", "lang_model.lm_head.weight"),
        ]
    )


def _make_resampler_rules(inner: int) -> list[Rule]:
    """Make the rules for the resampler's names.

    Args:
        inner: channels of its attention. vlm stacks the matrices of keys and values, of `inner` rows each.
    """

    def stack(match: re.Match[str]) -> list[Target]:
        return stack_rows(f"vision_tokenizer.layers.{match[1]}.0.to_kv.weight", "kv", match[2], inner)

    resampler, ours = re.escape(_PERCEIVER), r"vision_tokenizer.layers.\1."
    attention, feed_forward = rf"{resampler}blocks\.(\d+)\.0\.", rf"{resampler}blocks\.(\d+)\.1\."
    return [
        (rf"{resampler}latents", "vision_tokenizer.latents"),
        (rf"{resampler}layer_norm\.(\w+)", r"vision_tokenizer.norm.\1"),
        (rf"{attention}context_layer_norm\.(\w+)", rf"{ours}0.norm_media.\2"),
        (rf"{attention}latents_layer_norm\.(\w+)", rf"{ours}0.norm_latents.\2"),
        (rf"{attention}([qk])_layer_norm\.(\w+)", rf"{ours}0.\2_norm.\3"),
        (rf"{attention}q_proj\.weight", rf"{ours}0.to_q.weight"),
        (rf"{attention}([kv])_proj\.weight", stack),
        (rf"{attention}output_proj\.weight", rf"{ours}0.to_out.weight"),
        (rf"{feed_forward}ln\.(\w+)", rf"{ours}1.0.\2"),
        (rf"{feed_forward}fc\.weight", rf"{ours}1.1.weight"),
        (rf"{feed_forward}c_proj\.weight", rf"{ours}1.3.weight"),
    ]


def _make_gate(gate: Tensor) -> Tensor:
    """Return a block's gate as IDEFICS has it: float[1], or float[1, 1, d]."""
    return gate if gate.shape == (1,) else gate[None, None]


def _make_block_rules(every: int) -> list[Rule]:
    """Make the rules for the names of cross-attention blocks.

    IDEFICS counts blocks 0, 1, 2, …, and vlm numbers a block by its decoder layer.

    Args:
        every: decoder layers from one block to the next.
    """

    def to_block(
        name: str,
        transform: Callable[[Tensor], Tensor] = identity,
        restore: Callable[[Tensor], Tensor] | None = None,
    ) -> TargetsOfMatch:
        def targets_of(match: re.Match[str]) -> list[Target]:
            number = int(match[1]) * every
            return [Target(f"fusion.blocks.{number}.{match.expand(name)}", transform=transform, restore=restore)]

        return targets_of

    block = rf"{re.escape(_BLOCKS)}(\d+)\."
    return [
        (rf"{block}alpha_cross_attn", to_block("attn_gate", torch.flatten, _make_gate)),  # [1, 1, d] -> [d]
        (rf"{block}alpha_dense", to_block("ff_gate", torch.flatten, _make_gate)),
        (rf"{block}input_layernorm\.weight", to_block("attn.norm.weight")),
        (rf"{block}post_attention_layernorm\.weight", to_block("ff.norm.weight")),
        (rf"{block}cross_attn\.([qk])_layer_norm\.weight", to_block(r"attn.\2_norm.weight")),
        (rf"{block}cross_attn\.([qkvo]_proj)\.weight", to_block(r"attn.\2.weight")),
        (rf"{block}mlp\.(\w+)\.weight", to_block(r"ff.\2.weight")),
    ]
