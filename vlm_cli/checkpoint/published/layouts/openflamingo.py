"""OpenFlamingo, as its published checkpoints are written: trained tensors over a frozen tower and language model.

Source: https://github.com/mlfoundations/open_flamingo, branch `main`, and tag 0.1.1 for v1: `src/flamingo.py`,
`src/flamingo_lm.py` and `train/train_utils.py`. What the later branch `reduce-scope-mllm` writes is another layout.
"""

from __future__ import annotations

import re
from typing import Any

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.layouts.base import CheckpointDescription, Target, TargetsOf, number_of, renamer
from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = [
    "OpenFlamingo",
    "attention_channels",
    "check_fusion",
    "check_heads",
    "cross_attention_options",
    "perceiver_options",
]

_HEAD_WIDTH = 64  # of every published model; shapes give only heads × width
#: Each block stands twice in a model, under the language model and inside its layer; v1 may have kept either name.
_BLOCK = r"lang_encoder\.(?:.+\.(\d+)\.gated_cross_attn_layer|gated_cross_attn_layers\.(\d+))\."
_EMBEDDING = r"lang_encoder\.(.*(?:wte|embed_in|embed_tokens))\.weight"
_HEAD = r"lang_encoder\.(embed_out|lm_head)\.weight"

#: (name of the language model's embedding, channels) -> the language model that was published with it.
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
        names = checkpoint.tensors
        return "perceiver.latents" in names and any(re.match(_BLOCK, name) for name in names)

    def describe(self, checkpoint: PublishedCheckpoint) -> CheckpointDescription:
        known = _language_model(checkpoint)
        # Every published model reads this tower, and none its last norm: OpenCLIP gave patches before it until version
        # 2.22, of October 2023, and these models are older.
        is_published = checkpoint.shape("perceiver.latents")[1] == 1024
        tower = {"name": "ViT-L-14", "pretrained": "openai"} if is_published else {"name": ""}
        notes = (
            f"The checkpoint does not name its language model; by its shapes it is {known or 'none of the published'}. "
            "If it was trained with another (an instruct variant, say), name that: --language-model.",
            "Patches are read before the vision encoder's last norm, as in the published models. If it was trained "
            "with OpenCLIP 2.23 or later: --set vision_encoder.norm=true.",
        )
        return CheckpointDescription(
            composition={
                "family": "flamingo",
                "vision_encoder": {**tower, "norm": False},
                "vision_tokenizer": {"type": "perceiver", **perceiver_options(checkpoint, "perceiver.")},
                "fusion": {"type": "cross-attention", **cross_attention_options(checkpoint, _BLOCK)},
                "language_model": {"name": known or ""},
                "added_tokens": [END_OF_CHUNK, MEDIA_TOKEN],
            },
            places=lambda config: _places(checkpoint, config),
            # Rows of an untied head were never trained, and are in a file only if their name says "embed" (GPT-NeoX).
            optional_pattern=r"added_tokens\.head\.\w+",
            notes=notes,
        )


def perceiver_options(checkpoint: PublishedCheckpoint, prefix: str) -> dict[str, Any]:
    """Settings of a resampler whose names are open_flamingo's, behind a prefix."""
    num_latents, dim = checkpoint.shape(f"{prefix}latents")
    frames, media = (checkpoint.tensors.get(f"{prefix}{name}") for name in ("frame_embs", "media_time_embs"))
    return {
        "depth": number_of(checkpoint, rf"{re.escape(prefix)}layers\.(\d+)\."),
        "num_latents": num_latents,
        "ff_mult": checkpoint.shape(f"{prefix}layers.0.1.1.weight")[0] // dim,
        "max_num_frames": frames and frames.shape[0],
        "max_num_media": media and media.shape[0],
        **_heads(attention_channels(checkpoint, re.escape(prefix))),
    }


def cross_attention_options(checkpoint: PublishedCheckpoint, block: str) -> dict[str, Any]:
    """Settings of the gated cross-attention.

    Args:
        checkpoint: with at least one block.
        block: pattern before the names inside of a block; one of its groups is the number of the decoder layer.

    Raises:
        CheckpointError: if the numbers are not regular.
    """
    layers = _layers(checkpoint, block)
    first, every = layers[0], layers[1] - layers[0] if len(layers) > 1 else layers[0] + 1
    if layers != list(range(first, first + every * len(layers), every)):
        raise CheckpointError(
            f"{checkpoint.name!r} has cross-attention before layers {layers}, which are not every {every}."
        )
    hidden, dim = next(
        info.shape for name, info in checkpoint.tensors.items() if re.fullmatch(rf"{block}ff\.1\.weight", name)
    )
    return {
        "every": every,
        "first": None if first == every - 1 else first,
        "ff_mult": hidden // dim,
        **_heads(attention_channels(checkpoint, block)),
    }


def check_heads(checkpoint: PublishedCheckpoint, pattern: str, part: str, options: Any) -> None:
    """Refuse heads that are not as many channels as the checkpoint has.

    Raises:
        CheckpointError: with both numbers.
    """
    inner = attention_channels(checkpoint, pattern)
    if options.num_heads * options.head_dim != inner:
        raise CheckpointError(
            f"{checkpoint.name!r} has attention of {inner} channels in its {part.replace('_', ' ')}, and "
            f"{options.num_heads} heads of {options.head_dim} are {options.num_heads * options.head_dim}. Shapes do "
            f"not tell heads apart; say them: --set {part}.num_heads=… --set {part}.head_dim=…"
        )


def check_fusion(checkpoint: PublishedCheckpoint, block: str, config: VLMConfig) -> None:
    """Refuse a language model or an interval with blocks before other layers than the checkpoint has.

    Raises:
        CheckpointError: with both lists of numbers.
    """
    options, depth = config.composition.fusion.options, config.get_text_config(decoder=True).num_hidden_layers
    first = options.every - 1 if options.first is None else options.first
    ours, theirs = list(range(first, depth, options.every)), _layers(checkpoint, block)
    if ours != theirs:
        raise CheckpointError(
            f"{checkpoint.name!r} has cross-attention before layers {theirs}; a language model of {depth} layers with "
            f"fusion.every={options.every} has it before {ours}. Was it trained with this language model?"
        )
    check_heads(checkpoint, block, "fusion", options)


def _layers(checkpoint: PublishedCheckpoint, block: str) -> list[int]:
    matches = (re.match(block, name) for name in checkpoint.tensors)
    return sorted({int(next(x for x in match.groups() if x)) for match in matches if match})


def attention_channels(checkpoint: PublishedCheckpoint, pattern: str) -> int:
    """Heads × width of the attention whose names begin so."""
    names = re.compile(rf"{pattern}.*\bto_q\.weight")
    return next(info.shape[0] for name, info in checkpoint.tensors.items() if names.fullmatch(name))


def _heads(inner: int) -> dict[str, int]:
    """The heads of a published model; nothing where it is none, so that they have to be named."""
    return {} if inner % _HEAD_WIDTH else {"num_heads": inner // _HEAD_WIDTH, "head_dim": _HEAD_WIDTH}


def _table(checkpoint: PublishedCheckpoint) -> re.Match[str] | None:
    """The name of the resized input embedding."""
    return next((m for name in checkpoint.tensors if (m := re.fullmatch(_EMBEDDING, name))), None)


def _language_model(checkpoint: PublishedCheckpoint) -> str | None:
    table = _table(checkpoint)
    if table is None:
        return None
    return _LANGUAGE_MODELS.get((table[1].rpartition(".")[2], checkpoint.shape(table[0])[1]))


def _places(checkpoint: PublishedCheckpoint, config: VLMConfig) -> TargetsOf:
    first, parts = config.first_added_id, config.composition
    check_heads(checkpoint, r"perceiver\.", "vision_tokenizer", parts.vision_tokenizer.options)
    check_fusion(checkpoint, _BLOCK, config)
    _check_rows(checkpoint, config)
    has_head = any(re.fullmatch(_HEAD, name) for name in checkpoint.tensors)
    is_tied = getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False) and not has_head

    # GPT-NeoX's head has this name since Transformers 5.
    renamed = {"embed_out": "lm_head"} if config.text_config.model_type == "gpt_neox" else {}

    def table(*ours: str) -> Any:
        """The resized table: base rows stay with the language model, the others are ours."""
        return lambda match: [
            Target(
                f"lang_model.{renamed.get(match[1], match[1])}.weight",
                target_rows=slice(first),
                source_rows=slice(first),
            ),
            *(Target(f"added_tokens.{x}.weight", source_rows=slice(first, None)) for x in ours),
        ]

    def block(match: Any) -> list[Target]:
        return [Target(f"fusion.blocks.{match[1] or match[2]}.{match[3]}")]

    return renamer(
        [
            (r"perceiver\.(.*)", r"vision_tokenizer.\1"),
            (rf"{_BLOCK}(.*)", block),
            (_EMBEDDING, table("embedding", *(["head"] if is_tied else []))),
            (_HEAD, table("head")),
            (r"vision_encoder\.(?:visual\.)?(.*)", r"vision_encoder.visual.\1"),
            (r"lang_encoder\.old_decoder_blocks\..*", None),  # the same layers under a second name
            (r"lang_encoder\.(.*?\.\d+)\.decoder_layer\.(.*)", r"lang_model.\1.\2"),
            (r"lang_encoder\.(.*)", r"lang_model.\1"),
        ]
    )


def _check_rows(checkpoint: PublishedCheckpoint, config: VLMConfig) -> None:
    table = _table(checkpoint)
    rows, added = checkpoint.shape(table[0])[0] if table else None, len(config.added_tokens)
    if rows is not None and rows != config.first_added_id + added:
        raise CheckpointError(
            f"{checkpoint.name!r} has embeddings of {rows} tokens; with this language model there are "
            f"{config.first_added_id}, and {added} that are added. Was it trained with this language model?"
        )
