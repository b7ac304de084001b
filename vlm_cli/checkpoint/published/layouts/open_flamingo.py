"""OpenFlamingo v1 and v2 as published: trained tensors over a frozen vision encoder and language model.

Source: https://github.com/mlfoundations/open_flamingo, branch `main`, and tag 0.1.1 for v1: `src/flamingo.py`,
`src/flamingo_lm.py` and `train/train_utils.py`. `open_flamingo_v3.py` reads what the later branch writes.
"""

from __future__ import annotations

import re

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription
from vlm_cli.checkpoint.published.layouts.parts import (
    check_fusion,
    check_heads,
    read_cross_attention_options,
    read_perceiver_options,
)
from vlm_cli.checkpoint.published.tables import Table, table_targets, tables_filled
from vlm_cli.checkpoint.published.targets import Target, TargetsOf, make_targets_of
from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = ["OpenFlamingo"]

#: A block has two names in a model: one under the language model and one inside its layer. v1 may have kept either.
_BLOCK = r"lang_encoder\.(?:.+\.(\d+)\.gated_cross_attn_layer|gated_cross_attn_layers\.(\d+))\."
_EMBEDDING = r"lang_encoder\.(.*(?:wte|embed_in|embed_tokens))\.weight"
_HEAD = r"lang_encoder\.(embed_out|lm_head)\.weight"

#: (last word of the embedding's name, its channels) -> the language model that was published with it.
_LANGUAGE_MODELS = {
    ("embed_in", 2560): "togethercomputer/RedPajama-INCITE-Base-3B-v1",
    ("wte", 2048): "anas-awadalla/mpt-1b-redpajama-200b",
    ("wte", 4096): "anas-awadalla/mpt-7b",
    ("embed_tokens", 4096): "huggyllama/llama-7b",
}


class OpenFlamingo:
    """`perceiver.*` and `lang_encoder.*gated_cross_attn_layer*`, with the whole resized embedding."""

    name = "OpenFlamingo"
    source = "https://github.com/mlfoundations/open_flamingo/blob/main/open_flamingo/src/flamingo.py"

    def matches(self, checkpoint: PublishedCheckpoint) -> bool:
        """Look for the Perceiver's latents and a block."""
        names = checkpoint.tensors
        return "perceiver.latents" in names and any(re.match(_BLOCK, name) for name in names)

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        """Read sizes from shapes, and guess the backbones of a published model, which the files do not name."""
        known = _guess_language_model(checkpoint)
        # Every published model reads this tower, and none its last norm: OpenCLIP gave patches before the norm until
        # version 2.22 (October 2023), and the published models are older.
        is_published = checkpoint.shape("perceiver.latents")[1] == 1024
        tower = {"name": "ViT-L-14", "pretrained": "openai"} if is_published else {"name": ""}
        notes = (
            "The checkpoint does not name its language model. "
            + (f"By its shapes it is {known}. " if known else "Its shapes are those of no published model. ")
            + "If it was trained with another (an instruct variant, say), name that: --language-model.",
            "vlm takes patches before the vision encoder's last norm, as the published models do. If the checkpoint "
            "was trained with OpenCLIP 2.23 or later: --set vision_encoder.norm=true.",
        )
        return CheckpointDescription(
            composition={
                "family": "flamingo",
                "vision_encoder": {**tower, "norm": False},
                "vision_tokenizer": {"type": "perceiver", **read_perceiver_options(checkpoint, "perceiver.")},
                "fusion": {"type": "cross-attention", **read_cross_attention_options(checkpoint, _BLOCK)},
                "language_model": {"name": known or ""},
                "added_tokens": [END_OF_CHUNK, MEDIA_TOKEN],
            },
            targets_for=lambda config: _make_targets(checkpoint, config),
            # OpenFlamingo never trained the added rows of an untied head. It saved them only if their name contains
            # "embed", as GPT-NeoX's does.
            optional_pattern=r"added_tokens\.head\.\w+",
            notes=notes,
        )


def _find_embedding(checkpoint: PublishedCheckpoint) -> re.Match[str] | None:
    """Return the match of the resized embedding's name; its first group is the name inside the language model."""
    return next((m for name in checkpoint.tensors if (m := re.fullmatch(_EMBEDDING, name))), None)


def _guess_language_model(checkpoint: PublishedCheckpoint) -> str | None:
    """Return the published language model whose embedding has this name and width."""
    embedding = _find_embedding(checkpoint)
    if embedding is None:
        return None
    return _LANGUAGE_MODELS.get((embedding[1].rpartition(".")[2], checkpoint.shape(embedding[0])[1]))


def _make_targets(checkpoint: PublishedCheckpoint, config: VLMConfig) -> TargetsOf:
    """Make the lookup of targets for a VLM of this configuration.

    Raises:
        CheckpointError: if the composition has other heads, layers or tokens than the checkpoint.
    """
    check_heads(checkpoint, r"perceiver\.", "vision_tokenizer", config.composition.vision_tokenizer.options)
    check_fusion(checkpoint, _BLOCK, config)
    _check_rows(checkpoint, config)
    filled = tables_filled(checkpoint, config, embedding=_EMBEDDING, head=_HEAD)
    first = config.first_added_id
    # Transformers 5 renamed GPT-NeoX's head.
    renamed = {"embed_out": "lm_head"} if config.text_config.model_type == "gpt_neox" else {}

    def fill_table(match: re.Match[str], kind: Table) -> list[Target]:
        """Split the resized table into the language model's rows and the added rows after them."""
        name = f"lang_model.{renamed.get(match[1], match[1])}.weight"
        return table_targets(name, filled[kind], base=slice(first), added=slice(first, None))

    return make_targets_of(
        [
            (r"perceiver\.(.*)", r"vision_tokenizer.\1"),
            (rf"{_BLOCK}(.*)", lambda match: [Target(f"fusion.blocks.{match[1] or match[2]}.{match[3]}")]),
            (_EMBEDDING, lambda match: fill_table(match, "embedding")),
            (_HEAD, lambda match: fill_table(match, "head")),
            (r"vision_encoder\.(?:visual\.)?(.*)", r"vision_encoder.visual.\1"),
            (r"lang_encoder\.old_decoder_blocks\..*", None),  # the decoder layers under a second name
            (r"lang_encoder\.(.*?\.\d+)\.decoder_layer\.(.*)", r"lang_model.\1.\2"),
            (r"lang_encoder\.(.*)", r"lang_model.\1"),
        ]
    )


def _check_rows(checkpoint: PublishedCheckpoint, config: VLMConfig) -> None:
    """Refuse a language model with another vocabulary than the checkpoint was trained with.

    Raises:
        CheckpointError: with the numbers of tokens.
    """
    embedding = _find_embedding(checkpoint)
    if embedding is None:
        return
    rows, added = checkpoint.shape(embedding[0])[0], len(config.added_tokens)
    if rows != config.first_added_id + added:
        raise CheckpointError(
            f"{checkpoint.name!r} has embeddings of {rows} tokens; this language model has {config.first_added_id}, "
            f"and {added} are added. Was the checkpoint trained with this language model?"
        )
