"""Facts about any causal language model of Transformers, found by its structure and not by its class.

Nothing here changes the language model: no layer is wrapped, no table is replaced, no object changes its class.
B batch, T positions, d channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlm_cli.composition import UNSUITABLE_LANGUAGE_MODELS
from vlm_cli.errors import CompositionError, LanguageModelError
from vlm_cli.registry import suggest
from vlm_cli.schema import show

__all__ = [
    "NO_CHUNKED_PREFILL",
    "NO_LEFT_PADDING",
    "Widths",
    "check_causal",
    "context_length",
    "decoder_layers",
    "embedding_scale",
    "find_tables",
    "find_widths",
    "update_hidden_states",
]

#: Type -> why Transformers' own model gives other answers if rows are padded at the left.
NO_LEFT_PADDING = {
    "deepseek_v4": "it counts its compressed keys from the first position, also if that is padding",
    "git": "it makes its own mask and ignores the mask that it gets",
    "recurrent_gemma": "its convolution and its recurrence read the padding",
    "rwkv": "it takes no mask",
    "xlstm": "it takes no mask",
}
#: Type -> why Transformers' own model cannot read several positions after a cache.
NO_CHUNKED_PREFILL = {
    "falcon_mamba": "its cached forward takes one position at a time",
    "jamba": "its cached forward resets its convolution and its state",
    "mamba": "its cached forward takes one position at a time",
    "openai-gpt": "it has no cache",
    "recurrent_gemma": "it keeps its state in itself and returns no cache",
    "zamba": "its cached forward resets its convolution and its state",
}

_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")


def check_causal(config: PreTrainedConfig, name: str) -> None:
    """Refuse a model that is not an autoregressive decoder of text, before its weights are downloaded or allocated.

    Args:
        config: of the model.
        name: of the model, for the message.

    Raises:
        LanguageModelError: with the reason.
    """
    kind = config.model_type
    usable = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(UNSUITABLE_LANGUAGE_MODELS))
    advice = "Choose a decoder-only model; run `vlm list language-models` to see the supported types."
    if getattr(config, "is_encoder_decoder", False):
        raise LanguageModelError(f"{name!r} ({kind}) is an encoder-decoder model, not a causal one. {advice}")
    if kind in UNSUITABLE_LANGUAGE_MODELS:
        raise LanguageModelError(f"{name!r} ({kind}) is {UNSUITABLE_LANGUAGE_MODELS[kind]}. {advice}")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote:
        raise LanguageModelError(
            f"{name!r} has type {kind!r}, which is not a causal language model.{suggest(kind, usable)} {advice}"
        )


@dataclass(frozen=True)
class Widths:
    """Channels of a language model at its input embedding, its decoder layers and its head; in OPT-350m they differ."""

    embedding: int
    layer: int
    head: int


def find_widths(lm: PreTrainedModel) -> Widths:
    """Read the channels of the input embedding, of the decoder layers and of the head.

    Raises:
        LanguageModelError: if the model has no input embedding or no head.
    """
    embedding: Any = lm.get_input_embeddings()
    head: Any = lm.get_output_embeddings()
    if embedding is None or head is None:
        raise LanguageModelError(f"{type(lm).__name__} has no {'head' if embedding is not None else 'embedding'}.")
    layer = lm.config.get_text_config(decoder=True).hidden_size
    return Widths(embedding=embedding.weight.shape[1], layer=layer, head=head.weight.shape[1])


def find_tables(lm: PreTrainedModel) -> tuple[str, str]:
    """Find the names of a language model's two tables of tokens. Works on the meta device.

    Returns:
        The names of the input embedding's weight and of the head's; tied tables have both names.
    """
    tables = lm.get_input_embeddings(), lm.get_output_embeddings()
    embedding, head = (next(name for name, x in lm.named_modules() if x is table) for table in tables)
    return f"{embedding}.weight", f"{head}.weight"


def embedding_scale(embedding: Any) -> float:
    """Return the factor by which a language model's input embedding multiplies its rows: 1, if it does not.

    Gemma's multiplies them by the root of its width. Rows of added tokens hold the product: they enter as they are.

    Args:
        embedding: the input embedding; it may be on the meta device.
    """
    found = getattr(embedding, "scalar_embed_scale", None)  # the number behind a buffer
    return float(getattr(embedding, "embed_scale", 1.0) if found is None else found)


def decoder_layers(lm: PreTrainedModel, name: str | None = None) -> nn.ModuleList:
    """Find the decoder layers of a causal language model, in order. Works on the meta device.

    Among the `nn.ModuleList`s outside vision and audio towers, the layers are the list with most parameters whose
    length is the depth in the configuration. If no list has that length, they are the list with most parameters whose
    elements Transformers keeps whole (`_no_split_modules`).

    Args:
        lm: the model.
        name: dotted name of the layers; None searches.

    Raises:
        CompositionError: if `name` is no list of layers.
        LanguageModelError: if the search finds none.
    """
    if name is not None:
        try:
            layers = lm.get_submodule(name)
        except AttributeError:
            layers = None
        if not isinstance(layers, nn.ModuleList):
            lists = ", ".join(n for n, m in lm.named_modules() if isinstance(m, nn.ModuleList))
            raise CompositionError(
                f"language_model.decoder_layers: {type(lm).__name__} has no list of layers at {show(name)}. It has: "
                f"{lists}."
            )
        return layers
    text = lm.config.get_text_config(decoder=True)
    depth = next((v for key in _DEPTH if isinstance(v := getattr(text, key, None), int)), None)
    stacks = _own_stacks(lm, type(text))
    whole = set(lm._no_split_modules or ())
    found = [s for s in stacks if len(s) == depth] or [s for s in stacks if {type(x).__name__ for x in s} <= whole]
    if not found:
        raise LanguageModelError(
            f"cannot find the decoder layers of {type(lm).__name__}. Name them: --set language_model.decoder_layers=…"
        )
    return max(found, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def _own_stacks(lm: PreTrainedModel, text_config: type) -> list[nn.ModuleList]:
    """Return the module lists that belong to the text decoder, and not to another tower of the model."""
    owners: dict[str, PreTrainedModel] = {}
    stacks = []
    for name, module in lm.named_modules():
        parent = owners.get(name.rpartition(".")[0], lm)
        owner = owners[name] = module if isinstance(module, PreTrainedModel) else parent
        mine = type(owner.config.get_text_config(decoder=True)) is text_config
        if mine and isinstance(module, nn.ModuleList) and len(module):
            stacks.append(module)
    return stacks


def context_length(config: PreTrainedConfig) -> int | None:
    """Return how many positions a language model can read; None if its configuration sets no limit."""
    text = config.get_text_config(decoder=True)
    lengths = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # MPT's is the second
    return next((x for x in lengths if isinstance(x, int)), None)


def update_hidden_states(
    update: Callable[[Tensor], Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    shape: torch.Size,
    dim: int,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the hidden states among a decoder layer's arguments through `update`, and return the arguments.

    Nearly all layers take float[B, T, d]. Layers with several residual streams S do not; `update` then runs on one
    stream, and its change is added:

    - float[S, B, T, d], AltUp (gemma3n): on stream 0, the active one;
    - float[B, T, S, d] and float[B, T, S·d], hyper-connections (deepseek_v4, qwen4_exp): from the mean, to all.

    Args:
        update: float[B, T, d] -> float[B, T, d].
        args, kwargs: arguments of the layer; hidden states are the first, or named `hidden_states`.
        shape: (B, T).
        dim: d.
    """
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.shape[-1] != dim:
        streams = hidden.unflatten(-1, (-1, dim))
        mean = streams.mean(-2)
        hidden = (streams + (update(mean) - mean).unsqueeze(-2)).flatten(-2)
    elif hidden.ndim == 3:
        hidden = update(hidden)
    elif hidden.shape[:2] == shape:
        mean = hidden.mean(-2)
        hidden = hidden + (update(mean) - mean).unsqueeze(-2)
    else:
        hidden = torch.cat([update(hidden[0])[None], hidden[1:]])
    return ((hidden, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, "hidden_states": hidden})
