"""Settings of a vision tokenizer and a fusion, read from the shapes of their tensors.

Several layouts share these parts: the Perceiver and the cross-attention blocks of open_flamingo, and BERT's Q-Former.
Shapes tell depths and widths. They do not tell heads apart, so a layout assumes the heads of its published models, and
`check_heads` refuses a checkpoint that has others.
"""

from __future__ import annotations

import re
from typing import Any

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.shapes import count_layers, find_layers, find_shape, interval_of
from vlm_cli.composition import GatedFusionOptions, PerceiverOptions
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.config import VLMConfig

__all__ = [
    "check_fusion",
    "check_heads",
    "guess_heads",
    "read_cross_attention_options",
    "read_perceiver_options",
    "read_qformer_options",
]


def read_perceiver_options(checkpoint: PublishedCheckpoint, prefix: str) -> dict[str, Any]:
    """Read the settings of a Perceiver Resampler with open_flamingo's names.

    Args:
        checkpoint: names and shapes.
        prefix: what stands before `latents`, `layers.` and so on.
    """
    num_latents, dim = checkpoint.shape(f"{prefix}latents")
    frames, media = (checkpoint.tensors.get(f"{prefix}{name}") for name in ("frame_embs", "media_time_embs"))
    return {
        "depth": count_layers(checkpoint, rf"{re.escape(prefix)}layers\.(\d+)\."),
        "num_latents": num_latents,
        "ff_mult": checkpoint.shape(f"{prefix}layers.0.1.1.weight")[0] // dim,
        "max_num_frames": frames and frames.shape[0],
        "max_num_media": media and media.shape[0],
        **guess_heads(checkpoint, re.escape(prefix), head_dim=64),
    }


def read_cross_attention_options(checkpoint: PublishedCheckpoint, block: str) -> dict[str, Any]:
    """Read the settings of gated cross-attention with open_flamingo's names.

    Args:
        checkpoint: has at least one block.
        block: pattern before the names inside a block; one of its groups is the number of the decoder layer.

    Raises:
        CheckpointError: if the blocks do not stand at equal intervals.
    """
    layers = find_layers(checkpoint, block)
    first, every = layers[0], interval_of(layers, single=layers[0] + 1)
    if every is None:
        raise CheckpointError(
            f"{checkpoint.name!r} has cross-attention before layers {layers}, which are not at equal intervals."
        )
    shape = find_shape(checkpoint, rf"{block}ff\.1\.weight")
    assert shape is not None
    return {
        "every": every,
        "first": None if first == every - 1 else first,
        "ff_mult": shape[0] // shape[1],
        **guess_heads(checkpoint, block, head_dim=64),
    }


def read_qformer_options(checkpoint: PublishedCheckpoint, prefix: str, num_heads: int | None = None) -> dict[str, Any]:
    """Read the settings of a Q-Former with BERT's names.

    Args:
        checkpoint: names and shapes.
        prefix: what stands before `query_tokens` and `qformer.encoder.`.
        num_heads: attention heads; None leaves vlm's default.

    Raises:
        CheckpointError: if the layers with cross-attention are not 0, n, 2n, … for any n.
    """
    layer = rf"{re.escape(prefix)}qformer\.encoder\.layer\.(\d+)\."
    depth, crossing = count_layers(checkpoint, layer), find_layers(checkpoint, rf"{layer}crossattention\.")
    every = interval_of(crossing, single=depth)
    if every is None or crossing != list(range(0, depth, every)):
        raise CheckpointError(
            f"{checkpoint.name!r} has cross-attention in layers {crossing} of its {depth}, which are not at equal "
            "intervals from layer 0."
        )
    _, num_queries, dim = checkpoint.shape(f"{prefix}query_tokens")
    return {
        "type": "qformer",
        "num_queries": num_queries,
        "depth": depth,
        "dim": dim,
        **({} if num_heads is None else {"num_heads": num_heads}),
        "dim_ff": checkpoint.shape(f"{prefix}qformer.encoder.layer.0.intermediate_query.dense.weight")[0],
        "cross_attention_every": every,
    }


def check_heads(
    checkpoint: PublishedCheckpoint, pattern: str, part: str, options: PerceiverOptions | GatedFusionOptions
) -> None:
    """Refuse settings whose heads do not have as many channels as the checkpoint's attention.

    Args:
        checkpoint: names and shapes.
        pattern: of the beginnings of the attention's names.
        part: `vision_tokenizer` or `fusion`.
        options: that part's settings, with `num_heads` and `head_dim`.

    Raises:
        CheckpointError: with both numbers of channels.
    """
    inner = _count_attention_channels(checkpoint, pattern)
    if options.num_heads * options.head_dim != inner:
        raise CheckpointError(
            f"{checkpoint.name!r} has attention of {inner} channels in its {part.replace('_', ' ')}, and "
            f"{options.num_heads} heads of {options.head_dim} channels make {options.num_heads * options.head_dim}. "
            f"Shapes do not tell how many heads there are. Give both: --set {part}.num_heads=… --set {part}.head_dim=…"
        )


def check_fusion(checkpoint: PublishedCheckpoint, block: str, config: VLMConfig) -> None:
    """Refuse a language model or an interval that puts blocks before other layers than the checkpoint has.

    Raises:
        CheckpointError: with both lists of layers.
    """
    options, depth = config.composition.fusion.options, config.get_text_config(decoder=True).num_hidden_layers
    first = options.every - 1 if options.first is None else options.first
    wanted, found = list(range(first, depth, options.every)), find_layers(checkpoint, block)
    if wanted != found:
        raise CheckpointError(
            f"{checkpoint.name!r} has cross-attention before layers {found}; a language model of {depth} layers with "
            f"fusion.every={options.every} has it before {wanted}. Was the checkpoint trained with this language model?"
        )
    check_heads(checkpoint, block, "fusion", options)


def guess_heads(checkpoint: PublishedCheckpoint, pattern: str, head_dim: int) -> dict[str, int]:
    """Return the heads of the published models, or nothing if their `head_dim` does not divide the channels.

    Args:
        checkpoint: names and shapes.
        pattern: of the beginnings of the attention's names.
        head_dim: channels of a head in the published models.
    """
    inner = _count_attention_channels(checkpoint, pattern)
    return {} if inner % head_dim else {"num_heads": inner // head_dim, "head_dim": head_dim}


def _count_attention_channels(checkpoint: PublishedCheckpoint, pattern: str) -> int:
    """Return heads × channels of a head, for the attention whose names begin with a pattern."""
    shape = find_shape(checkpoint, rf"{pattern}.*\bto_q\.weight")
    assert shape is not None
    return shape[0]
