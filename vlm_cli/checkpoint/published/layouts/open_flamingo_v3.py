"""open_flamingo's later code base: any of its four families, whole or trained tensors alone.

Source: https://github.com/mlfoundations/open_flamingo, branch `reduce-scope-mllm`: `open_flamingo/src/vlm.py`,
`helpers.py` and `train/train_utils.py`. The names are `OPEN_FLAMINGO_NAMES`, which `--weights` reads too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, Target, TargetsOf, number_of, renamer
from vlm_cli.checkpoint.published.layouts.openflamingo import (
    check_fusion,
    check_heads,
    cross_attention_options,
    perceiver_options,
)
from vlm_cli.checkpoint.weights import OPEN_FLAMINGO_NAMES
from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["ReducedScope", "check_bias", "decoupled_table", "has_bias"]

_BLOCK = r"lang_model\.(?:.+\.(\d+)\.gated_cross_attn_layer|gated_cross_attn_layers\.(\d+))\."
_ROWS = r"lang_model\..*\.additional_(?:embedding|fc)\."
#: What each family's vision tokenizer always has.
_LATENTS, _QUERIES, _PROJECTION = (f"vision_tokenizer.{x}" for x in ("latents", "query_tokens", "proj.weight"))
_QFORMER = r"vision_tokenizer\.qformer\.encoder\.layer\.(\d+)\."


class ReducedScope:
    """`vision_tokenizer.*`, and `lang_model.*` with `additional_fc` or `gated_cross_attn_layer` among its names."""

    name = "open_flamingo, later branch"
    source = "https://github.com/mlfoundations/open_flamingo/blob/reduce-scope-mllm/open_flamingo/src/vlm.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        names = checkpoint.tensors
        return any(anchor in names for anchor in (_LATENTS, _QUERIES, _PROJECTION)) and all(
            re.match(r"vision_encoder\.(?!visual\.)|vision_tokenizer\.|lang_model\.", name) for name in names
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        parts = _parts(checkpoint)
        is_stream = parts["family"] != "flamingo"
        rows = {checkpoint.shape(name)[0] for name in checkpoint.tensors if re.match(_ROWS, name)}
        has_lm = any(True for _ in _base_names(checkpoint))
        # Where `<image>` is, there are vision tokens: BLIP leaves its row as it was drawn, and does not save it. The
        # pad token, for which the code base took a row of the language model, has one of ours.
        optional_pattern = [r"added_tokens\.(embedding|head)\.\w+"] if rows or is_stream else []
        notes = [
            "The code base made its vision encoder read images of 490 pixels. If this was trained so: --set "
            "vision_encoder.image_size=490."
        ]
        if has_bias(checkpoint) and not _base_bias(checkpoint):
            optional_pattern.append(r"added_tokens\.base_bias")
            notes.append(
                "The code base gave the head a random bias, which it neither trained nor saved; it is left out, and "
                "logits differ from those in training by it."
            )
        if parts["family"] == "blip":
            notes.append("Shapes do not tell the heads of a Q-Former. Those of the code base are 12; see --set.")
        return CheckpointDescription(
            composition={
                **parts,
                "vision_encoder": {"name": ""},  # neither is named in the file
                "language_model": {"name": "", "head_bias": has_bias(checkpoint)},
                "added_tokens": [MEDIA_TOKEN] if is_stream else [END_OF_CHUNK, MEDIA_TOKEN],
            },
            places=lambda config: _places(checkpoint, config),
            holds_language_model=has_lm,
            optional_pattern="|".join(optional_pattern) or r"(?!)",
            notes=tuple(notes),
        )


def _parts(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    """The family, its vision tokenizer and its fusion."""
    names = checkpoint.tensors
    if _QUERIES in names:
        return {"family": "blip", "vision_tokenizer": {"type": "qformer", **_qformer_options(checkpoint)}}
    if _PROJECTION in names:
        return {"family": "llava", "vision_tokenizer": {"type": "linear"}}
    perceiver = {"type": "perceiver", **perceiver_options(checkpoint, "vision_tokenizer.")}
    if any(re.match(_BLOCK, name) for name in names):
        fusion = {"type": "cross-attention", **cross_attention_options(checkpoint, _BLOCK)}
        return {"family": "flamingo", "vision_tokenizer": perceiver, "fusion": fusion}
    if "vision_tokenizer.projection.weight" not in names:
        raise CheckpointError(
            f"{checkpoint.name!r} has a Perceiver without a projection, as in Flamingo, and no cross-attention. Is it "
            "complete?"
        )
    return {"family": "kosmos", "vision_tokenizer": perceiver}


def _qformer_options(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    """Settings of a Q-Former, but for its heads."""
    _, num_queries, dim = checkpoint.shape(_QUERIES)
    numbers = {int(m[1]) for name in checkpoint.tensors if (m := re.match(rf"{_QFORMER}crossattention\.", name))}
    every = min(numbers - {0}, default=None)
    depth = number_of(checkpoint, _QFORMER)
    return {
        "num_queries": num_queries,
        "dim": dim,
        "depth": depth,
        "dim_ff": checkpoint.shape("vision_tokenizer.qformer.encoder.layer.0.intermediate_query.dense.weight")[0],
        "cross_attention_every": depth if every is None else every,
    }


def has_bias(checkpoint: PublishedCheckpoint) -> bool:
    """Whether the head has a bias. The code base gives each head one, where the language model has none too."""
    return any(name.endswith(".additional_fc.bias") for name in checkpoint.tensors)


def _base_names(checkpoint: PublishedCheckpoint) -> Iterator[str]:
    """Names of the language model's own tensors."""
    return (
        name
        for name in checkpoint.tensors
        if name.startswith("lang_model.") and not re.match(rf"{_ROWS}|{_BLOCK}", name)
    )


_BIAS = r"lang_model\.(?:lm_head|embed_out)\.bias"


def _base_bias(checkpoint: PublishedCheckpoint) -> bool:
    return any(re.fullmatch(_BIAS, name) for name in checkpoint.tensors)


def check_bias(checkpoint: PublishedCheckpoint, config: VLMConfig) -> None:
    """Refuse a composition that would drop the head's bias, or have two.

    Raises:
        CheckpointError: with what to add.
    """
    if not has_bias(checkpoint):
        return
    wanted, given = not _has_own_bias(config), config.composition.language_model.head_bias
    if wanted != given:
        raise CheckpointError(
            f"{checkpoint.name!r} has a head with a bias, and the language model has {'none' if wanted else 'one'} of "
            f"its own. Add --set language_model.head_bias={str(wanted).lower()}"
        )


def _has_own_bias(config: VLMConfig) -> bool:
    """Whether the language model is published with a head that has a bias (Phi, GPT-J)."""
    if config.text_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(config.text_config).get_output_embeddings()
    return getattr(head, "bias", None) is not None


def decoupled_table(config: VLMConfig) -> list[tuple[str, Any]]:
    """TargetsOf of tables that keep the language model's rows and the added ones apart.

    The added rows come in the composition's order, and are fewer than ours where the tokenizer lacks a pad token.
    """
    first = config.first_added_id
    num_named = len(config.composition.added_tokens)

    def added(ours: str) -> Any:
        return lambda match: [Target(f"added_tokens.{ours}.{match[1]}", target_rows=slice(num_named))]

    table: list[tuple[str, Any]] = [
        (r"lang_model\..*\.additional_embedding\.(weight)", added("embedding")),
        (r"lang_model\..*\.additional_fc\.(weight|bias)", added("head")),
    ]
    if config.composition.language_model.head_bias:
        table.append((_BIAS, lambda match: [Target("added_tokens.base_bias", source_rows=slice(first))]))
    if config.text_config.model_type == "gpt_neox":  # its head was called so before Transformers 5
        table.append((r"lang_model\.embed_out\.(\w+)", r"lang_model.lm_head.\1"))
    return table


def _places(checkpoint: PublishedCheckpoint, config: VLMConfig) -> TargetsOf:
    parts = config.composition
    if parts.vision_tokenizer.type == "perceiver":
        check_heads(checkpoint, r"vision_tokenizer\.", "vision_tokenizer", parts.vision_tokenizer.options)
    if parts.fusion.type == "cross-attention":
        check_fusion(checkpoint, _BLOCK, config)
    check_bias(checkpoint, config)
    return renamer([*decoupled_table(config), *OPEN_FLAMINGO_NAMES, (r"(.*)", r"\1")])
