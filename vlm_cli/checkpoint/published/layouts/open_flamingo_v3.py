"""open_flamingo's later code base, which has four families; whole models, or trained tensors alone.

Source: https://github.com/mlfoundations/open_flamingo, branch `reduce-scope-mllm`: `open_flamingo/src/vlm.py`,
`helpers.py` and `train/train_utils.py`. The rules for its names are `OWN_RULES`, which `--weights` uses too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.own import OWN_RULES
from vlm_cli.checkpoint.published.layouts.parts import (
    check_fusion,
    check_heads,
    read_cross_attention_options,
    read_perceiver_options,
    read_qformer_options,
)
from vlm_cli.checkpoint.published.targets import Rule, Target, TargetsOf, make_targets_of
from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.meta import meta_device
from vlm_cli.trust import make_language_model

__all__ = ["OpenFlamingoV3", "check_bias", "has_bias", "make_added_row_rules"]

_BLOCK = r"lang_model\.(?:.+\.(\d+)\.gated_cross_attn_layer|gated_cross_attn_layers\.(\d+))\."
_ROWS = r"lang_model\..*\.additional_(?:embedding|fc)\."
_BIAS = r"lang_model\.(?:lm_head|embed_out)\.bias"
#: A tensor that the vision tokenizer of each family always has.
_LATENTS, _QUERIES, _PROJECTION = (f"vision_tokenizer.{x}" for x in ("latents", "query_tokens", "proj.weight"))


class OpenFlamingoV3:
    """`vision_tokenizer.*`, and `lang_model.*` with `additional_fc` or `gated_cross_attn_layer` among its names."""

    name = "OpenFlamingo v3 (open_flamingo, later branch)"
    source = "https://github.com/mlfoundations/open_flamingo/blob/reduce-scope-mllm/open_flamingo/src/vlm.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for a family's vision tokenizer, and nothing outside of the three modules."""
        names = checkpoint.tensors
        return any(anchor in names for anchor in (_LATENTS, _QUERIES, _PROJECTION)) and all(
            re.match(r"vision_encoder\.(?!visual\.)|vision_tokenizer\.|lang_model\.", name) for name in names
        )

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read the family and its sizes from names and shapes; the user has to name both backbones."""
        parts = _read_parts(checkpoint)
        is_stream = parts["family"] != "flamingo"
        has_rows = any(re.match(_ROWS, name) for name in checkpoint.tensors)
        # In a language stream, vision tokens replace `<image>`: BLIP leaves its row untrained, and does not save it.
        # vlm gives the pad token an added row, for which the code base took a row of the language model.
        optional = [r"added_tokens\.(embedding|head)\.\w+"] if has_rows or is_stream else []
        notes = [
            "The code base resized its vision encoder to images of 490 pixels. If this checkpoint was trained so: "
            "--set vision_encoder.image_size=490."
        ]
        if has_bias(checkpoint) and not any(re.fullmatch(_BIAS, name) for name in checkpoint.tensors):
            optional.append(r"added_tokens\.base_bias")
            notes.append(
                "The code base gave the head a random bias, which it neither trained nor saved. vlm leaves the bias "
                "out, so logits differ from those in training by that bias."
            )
        if parts["family"] == "blip":
            notes.append(
                "Shapes do not tell how many heads a Q-Former has. The code base has 12; for another number: --set "
                "vision_tokenizer.num_heads=…"
            )
        return CheckpointDescription(
            composition={
                **parts,
                "vision_encoder": {"name": ""},  # the file names neither backbone
                "language_model": {"name": "", "head_bias": has_bias(checkpoint)},
                "added_tokens": [MEDIA_TOKEN] if is_stream else [END_OF_CHUNK, MEDIA_TOKEN],
            },
            targets_for=lambda config: _make_targets(checkpoint, config),
            holds_language_model=any(True for _ in _find_base_names(checkpoint)),
            optional_pattern="|".join(optional) or r"(?!)",
            notes=tuple(notes),
        )


def _read_parts(checkpoint: PublishedCheckpoint) -> dict[str, Any]:
    """Read the family, its vision tokenizer and its fusion.

    Raises:
        CheckpointError: if tensors are missing that the family has.
    """
    names = checkpoint.tensors
    if _QUERIES in names:
        return {"family": "blip", "vision_tokenizer": read_qformer_options(checkpoint, "vision_tokenizer.")}
    if _PROJECTION in names:
        return {"family": "llava", "vision_tokenizer": {"type": "linear"}}
    perceiver = {"type": "perceiver", **read_perceiver_options(checkpoint, "vision_tokenizer.")}
    if any(re.match(_BLOCK, name) for name in names):
        fusion = {"type": "cross-attention", **read_cross_attention_options(checkpoint, _BLOCK)}
        return {"family": "flamingo", "vision_tokenizer": perceiver, "fusion": fusion}
    if "vision_tokenizer.projection.weight" not in names:
        raise CheckpointError(
            f"{checkpoint.name!r} has a Perceiver without a projection, as in Flamingo, but no cross-attention. Is it "
            "complete?"
        )
    return {"family": "kosmos", "vision_tokenizer": perceiver}


def _find_base_names(checkpoint: PublishedCheckpoint) -> Iterator[str]:
    """Find the names of the language model's own tensors."""
    return (
        name
        for name in checkpoint.tensors
        if name.startswith("lang_model.") and not re.match(rf"{_ROWS}|{_BLOCK}", name)
    )


def has_bias(checkpoint: PublishedCheckpoint) -> bool:
    """Say whether the head has a bias. The code base adds one to every head, even if the language model has none."""
    return any(name.endswith(".additional_fc.bias") for name in checkpoint.tensors)


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
    """Say whether the language model's own head has a bias (Phi, GPT-J)."""
    if config.text_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    with meta_device():
        head = make_language_model(config.text_config).get_output_embeddings()
    return getattr(head, "bias", None) is not None


def make_added_row_rules(config: VLMConfig) -> list[Rule]:
    """Make the rules for added rows that the checkpoint keeps apart from the language model's tables.

    They stand in the composition's order. vlm has more added rows if the tokenizer lacks a pad token.
    """
    rows = slice(len(config.composition.added_tokens))

    def fill_rows(table: str, kind: str) -> list[Target]:
        return [Target(f"added_tokens.{table}.{kind}", target_rows=rows)]

    rules: list[Rule] = [
        (r"lang_model\..*\.additional_embedding\.(weight)", lambda match: fill_rows("embedding", match[1])),
        (r"lang_model\..*\.additional_fc\.(weight|bias)", lambda match: fill_rows("head", match[1])),
    ]
    if config.composition.language_model.head_bias:
        base = slice(config.first_added_id)
        rules.append((_BIAS, lambda _: [Target("added_tokens.base_bias", source_rows=base)]))
    if config.text_config.model_type == "gpt_neox":  # Transformers 5 renamed GPT-NeoX's head
        rules.append((r"lang_model\.embed_out\.(\w+)", r"lang_model.lm_head.\1"))
    return rules


def _make_targets(checkpoint: PublishedCheckpoint, config: VLMConfig) -> TargetsOf:
    """Make the lookup of targets for a VLM of this configuration.

    Raises:
        CheckpointError: if the composition has other heads, layers or biases than the checkpoint.
    """
    parts = config.composition
    if parts.vision_tokenizer.type == "perceiver":
        check_heads(checkpoint, r"vision_tokenizer\.", "vision_tokenizer", parts.vision_tokenizer.options)
    if parts.fusion.type == "cross-attention":
        check_fusion(checkpoint, _BLOCK, config)
    check_bias(checkpoint, config)
    return make_targets_of([*make_added_row_rules(config), *OWN_RULES])
