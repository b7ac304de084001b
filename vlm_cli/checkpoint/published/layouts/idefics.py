"""IDEFICS (https://arxiv.org/abs/2306.16527) as Transformers writes it.

Source: transformers/models/idefics, `IdeficsForVisionText2Text`: modeling_idefics.py, perceiver.py, vision.py and
processing_idefics.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, Target, TargetsOf, number_of, renamer
from vlm_cli.checkpoint.published.towers.clip import CLIP_UNNEEDED, clip_table, clip_vision_config, read_preprocessing
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["HuggingFaceIDEFICS"]

#: Added tokens in the order of their ids; the last is that of the instructed models.
_ADDED = ("<fake_token_around_image>", MEDIA_TOKEN, "<end_of_utterance>")

_PERCEIVER = "model.perceiver_resampler."
_BLOCKS = "model.gated_cross_attn_layers."


class HuggingFaceIDEFICS:
    """`model.vision_model`, `model.perceiver_resampler`, `model.gated_cross_attn_layers`, and Llama's layers."""

    name = "IDEFICS (Hugging Face)"
    source = "transformers/models/idefics/modeling_idefics.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        return checkpoint.config.get("model_type") == "idefics" and f"{_BLOCKS}0.alpha_cross_attn" in checkpoint.tensors

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        config = {**_DEFAULTS, **checkpoint.config}
        vision = {**_VISION_DEFAULTS, **config.get("vision_config", {})}
        vision["hidden_size"] = vision["embed_dim"]
        tower = clip_vision_config(vision, checkpoint.folder)
        tower["preprocess"] = read_preprocessing(checkpoint.folder, vision["image_size"], resize_mode="squash")
        if config["hidden_act"] != "silu":
            raise CheckpointError(
                f"{checkpoint.name!r} has activation {config['hidden_act']!r}; Llama's layers have silu."
            )
        every = _interval(checkpoint, config)
        added = checkpoint.tensors.get("model.embed_tokens.additional_embedding.weight")
        num_added = 0 if added is None else added.shape[0]
        if not 2 <= num_added <= len(_ADDED):
            raise CheckpointError(
                f"{checkpoint.name!r} has {num_added} tokens beside Llama's; IDEFICS has {' and '.join(_ADDED[:2])}, "
                f"and {_ADDED[2]} if it was instructed."
            )
        return CheckpointDescription(
            composition={
                "family": "flamingo",
                "vision_encoder": {"name": _name(vision), "norm": False, "class_token": True},
                "vision_tokenizer": _perceiver(checkpoint, config),
                "fusion": {
                    "type": "llama-cross-attention",
                    "every": every,
                    "first": 0,
                    "num_heads": config["num_attention_heads"],
                    "head_dim": config["hidden_size"] // config["num_attention_heads"],
                    "dim_ff": config["intermediate_size"],
                    "qk_norm": f"{_BLOCKS}0.cross_attn.q_layer_norm.weight" in checkpoint.tensors,
                    "gate": "scalar" if checkpoint.shape(f"{_BLOCKS}0.alpha_dense") == (1,) else "vector",
                    "norm_eps": config["rms_norm_eps"],
                },
                "language_model": {"name": checkpoint.name},
                "added_tokens": list(_ADDED[:num_added]),
            },
            places=lambda ours: _places(ours, vision["hidden_size"], every, checkpoint),
            text_config={
                "model_type": "llama",
                "num_key_value_heads": config["num_attention_heads"],
                **{name: config[name] for name in _OF_LLAMA if name in config},
            },
            vision_config=tower,
            first_added_id=config["vocab_size"],
            optional_pattern=CLIP_UNNEEDED,
            notes=(
                f"IDEFICS was trained with {_ADDED[0]} before and after each image, or between two that follow each "
                "other. A prompt is taken as it is written: write them, and read special tokens as such.",
                "A prompt without images is read by Llama alone; in IDEFICS it passes the feed-forwards of the "
                "cross-attention blocks too.",
            ),
        )


#: What a configuration that says nothing means (`IdeficsConfig`).
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
#: Settings that Llama has by the same names.
_OF_LLAMA = (
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
#: The same of its vision encoder (`IdeficsVisionConfig`).
_VISION_DEFAULTS: Mapping[str, Any] = {
    "embed_dim": 768,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}


def _name(vision: Mapping[str, Any]) -> str:
    """OpenCLIP's name of the tower, if it has these sizes."""
    sizes = (vision["hidden_size"], vision["num_hidden_layers"], vision["patch_size"], vision["image_size"])
    return "ViT-H-14" if sizes == (1280, 32, 14, 224) else "clip-vision-transformer"


def _interval(checkpoint: PublishedCheckpoint, config: Mapping[str, Any]) -> int:
    """From one decoder layer with a block to the next.

    Raises:
        CheckpointError: if the checkpoint has another number of blocks than its configuration says.
    """
    every, depth = config["cross_layer_interval"], config["num_hidden_layers"]
    found = number_of(checkpoint, rf"{_BLOCKS}(\d+)\.")
    if found * every != depth:
        raise CheckpointError(
            f"{checkpoint.name!r} has {found} cross-attention blocks, but cross_layer_interval={every} over {depth} "
            f"layers asks for {depth / every:g}."
        )
    return every


def _perceiver(checkpoint: PublishedCheckpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: if there is none.
    """
    if f"{_PERCEIVER}latents" not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.name!r} has no resampler (use_resampler={config['use_resampler']!r}); vlm has no vision "
            "tokenizer that keeps all patches for cross-attention as they are."
        )
    norm = checkpoint.tensors.get(f"{_PERCEIVER}blocks.0.0.q_layer_norm.weight")
    head_dim = config.get("perceiver_config", {}).get("resampler_head_dim", 96) if norm is None else norm.shape[0]
    num_latents, dim = checkpoint.shape(f"{_PERCEIVER}latents")
    inner = checkpoint.shape(f"{_PERCEIVER}blocks.0.0.q_proj.weight")[0]
    if inner % head_dim:
        raise CheckpointError(
            f"{checkpoint.name!r} has a resampler of {inner} channels in its attention, not a multiple of the "
            f"{head_dim} of a head."
        )
    return {
        "type": "perceiver",
        "depth": number_of(checkpoint, rf"{_PERCEIVER}blocks\.(\d+)\."),
        "num_latents": num_latents,
        "num_heads": inner // head_dim,
        "head_dim": head_dim,
        "ff_mult": checkpoint.shape(f"{_PERCEIVER}blocks.0.1.fc.weight")[0] // dim,
        "activation": "relu",
        "qk_norm": norm is not None,
    }


def _flat(x: Tensor) -> Tensor:
    """[1, 1, d] -> [d]."""
    return x.flatten()


def _places(ours: VLMConfig, vision_width: int, every: int, checkpoint: PublishedCheckpoint) -> TargetsOf:
    inner = checkpoint.shape(f"{_PERCEIVER}blocks.0.0.k_proj.weight")[0]

    def keys_values(match: Any) -> list[Target]:
        """One matrix of keys, then values."""
        start = "kv".index(match[2]) * inner
        return [Target(f"vision_tokenizer.layers.{match[1]}.0.to_kv.weight", target_rows=slice(start, start + inner))]

    def block(target: str, change: Any = None) -> Any:
        """Blocks are numbered by themselves there, and by their decoder layers here."""

        def places(match: Any) -> list[Target]:
            name = f"fusion.blocks.{int(match[1]) * every}.{match.expand(target)}"
            return [Target(name) if change is None else Target(name, transform=change)]

        return places

    is_tied = "lm_head.weight" not in checkpoint.tensors
    added = [Target("added_tokens.embedding.weight"), *([Target("added_tokens.head.weight")] if is_tied else [])]
    resampler, layer = r"model\.perceiver_resampler\.", r"model\.gated_cross_attn_layers\.(\d+)\."
    attention, feed_forward = rf"{resampler}blocks\.(\d+)\.0\.", rf"{resampler}blocks\.(\d+)\.1\."
    mine = r"vision_tokenizer.layers.\1."
    return renamer(
        [
            *clip_table(r"model\.vision_model\.", vision_width),
            (rf"{resampler}latents", "vision_tokenizer.latents"),
            (rf"{resampler}layer_norm\.(\w+)", r"vision_tokenizer.norm.\1"),
            (rf"{attention}context_layer_norm\.(\w+)", rf"{mine}0.norm_media.\2"),
            (rf"{attention}latents_layer_norm\.(\w+)", rf"{mine}0.norm_latents.\2"),
            (rf"{attention}([qk])_layer_norm\.(\w+)", rf"{mine}0.\2_norm.\3"),
            (rf"{attention}q_proj\.weight", rf"{mine}0.to_q.weight"),
            (rf"{attention}([kv])_proj\.weight", keys_values),
            (rf"{attention}output_proj\.weight", rf"{mine}0.to_out.weight"),
            (rf"{feed_forward}ln\.(\w+)", rf"{mine}1.0.\2"),
            (rf"{feed_forward}fc\.weight", rf"{mine}1.1.weight"),
            (rf"{feed_forward}c_proj\.weight", rf"{mine}1.3.weight"),
            (rf"{layer}alpha_cross_attn", block("attn_gate", _flat)),
            (rf"{layer}alpha_dense", block("ff_gate", _flat)),
            (rf"{layer}input_layernorm\.weight", block("attn.norm.weight")),
            (rf"{layer}post_attention_layernorm\.weight", block("ff.norm.weight")),
            (rf"{layer}cross_attn\.([qk])_layer_norm\.weight", block(r"attn.\2_norm.weight")),
            (rf"{layer}cross_attn\.([qkvo]_proj)\.weight", block(r"attn.\2.weight")),
            (rf"{layer}mlp\.(\w+)\.weight", block(r"ff.\2.weight")),
            (r"model\..*\.rotary_emb\.inv_freq", None),  # computed anew
            (r"model\.embed_tokens\.additional_embedding\.weight", lambda match: added),
            (r"model\.embed_tokens\.weight", "lang_model.model.embed_tokens.weight"),
            (r"model\.(layers\..*|norm\..*)", r"lang_model.model.\1"),
            (r"lm_head\.additional_fc\.weight", "added_tokens.head.weight"),
            (r"lm_head\.weight", "lang_model.lm_head.weight"),
        ]
    )
