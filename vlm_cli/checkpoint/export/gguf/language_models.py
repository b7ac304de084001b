"""Which language models llama.cpp runs, and what their GGUF files hold.

gguf knows the names of an architecture's tensors. This module adds the hyperparameters, and the few tensors that
llama.cpp wants in another order than Transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH
from torch import Tensor

from vlm_cli.errors import UsageError
from vlm_cli.modeling.language_model import embedding_scale
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of

__all__ = ["ARCHITECTURES", "describe_language_model", "embedding_factor", "find_language_problems", "language_weights"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp reads a type of language model.

    Attributes:
        arch: llama.cpp's architecture.
        rotates_neighbours: whether it rotates channels 2i and 2i+1 of queries and keys, not i and i + half.
        shifts_norms: whether the factor of a norm is 1 + weight in Transformers.
        scales_embeddings: whether the embeddings of tokens are multiplied by the root of their width.
        scales_vision_tokens: whether llama.cpp multiplies vision tokens, too.
        windows: whether some layers see a sliding window.
        needs_head: whether llama.cpp wants a head of its own also where the model has its table for it.
        problems: what of the configuration llama.cpp does not have.
    """

    arch: MODEL_ARCH
    rotates_neighbours: bool = False
    shifts_norms: bool = False
    scales_embeddings: bool = False
    scales_vision_tokens: bool = False
    windows: bool = False
    needs_head: bool = False
    problems: Callable[[Any], list[str]] = lambda config: []


def _gemma_problems(config: Any) -> list[str]:
    problems = []
    if config.query_pre_attn_scalar != config.head_dim:
        problems.append(
            f"the language model's query_pre_attn_scalar is {config.query_pre_attn_scalar}; it would have to be its "
            f"head_dim, {config.head_dim}."
        )
    if getattr(config, "use_bidirectional_attention", False):
        problems.append("the language model looks ahead (use_bidirectional_attention); it would have to be causal.")
    return problems


def _gemma3_problems(config: Any) -> list[str]:
    kinds = config.layer_types
    wanted = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(len(kinds))]
    problems = _gemma_problems(config)
    if kinds != wanted:
        problems.append("the language model's layer_types differ from Gemma 3's: every sixth layer sees everything.")
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None):
        problems.append("the language model caps its logits, which llama.cpp does for Gemma 2 alone.")
    local = config.rope_parameters["sliding_attention"]
    if local != {"rope_type": "default", "rope_theta": 10000.0}:
        problems.append(f"the rotation of layers with a window is {local}; llama.cpp has a rope_theta of 10000 there.")
    return problems


def _gemma2_problems(config: Any) -> list[str]:
    wanted = ["full_attention" if i % 2 else "sliding_attention" for i in range(len(config.layer_types))]
    differs = config.layer_types != wanted
    return _gemma_problems(config) + (
        ["the language model's layer_types differ from Gemma 2's: every second layer sees everything."] * differs
    )


def _smollm3_problems(config: Any) -> list[str]:
    wanted = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    differs = list(config.no_rope_layers) != wanted
    return ["the language model's no_rope_layers differ from SmolLM3's: every fourth layer rotates nothing."] * differs


#: Type of Transformers' language model -> how llama.cpp reads it.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(arch=MODEL_ARCH.LLAMA, rotates_neighbours=True),
    "mistral": Architecture(arch=MODEL_ARCH.LLAMA, rotates_neighbours=True),
    "qwen2": Architecture(arch=MODEL_ARCH.QWEN2),
    "qwen3": Architecture(arch=MODEL_ARCH.QWEN3),
    "smollm3": Architecture(arch=MODEL_ARCH.SMOLLM3, rotates_neighbours=True, problems=_smollm3_problems),
    "olmo2": Architecture(arch=MODEL_ARCH.OLMO2, needs_head=True),
    "seed_oss": Architecture(arch=MODEL_ARCH.SEED_OSS),
    "gemma": Architecture(arch=MODEL_ARCH.GEMMA, shifts_norms=True, scales_embeddings=True, scales_vision_tokens=True),
    "gemma2": Architecture(
        arch=MODEL_ARCH.GEMMA2,
        shifts_norms=True,
        scales_embeddings=True,
        scales_vision_tokens=True,
        windows=True,
        problems=_gemma2_problems,
    ),
    "gemma3_text": Architecture(
        arch=MODEL_ARCH.GEMMA3, shifts_norms=True, scales_embeddings=True, windows=True, problems=_gemma3_problems
    ),
    "phi3": Architecture(arch=MODEL_ARCH.PHI3),
}

#: Rotations that this module can describe: the plain one, and positions divided by a factor.
_ROTATIONS = ("default", "linear")


def find_language_problems(config: Any) -> list[str]:
    """Say what of a language model's configuration llama.cpp cannot hold, or this module cannot describe."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        return [f"the language model is of type {config.model_type}; it would have to be {', '.join(ARCHITECTURES)}."]
    problems = found.problems(config)
    wanted = "gelu_pytorch_tanh" if found.shifts_norms else "silu"
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != wanted:
        problems.append(f"the language model's activation is {activation}; it would have to be {wanted}.")
    for rope in _rotations(config):
        if rope.get("rope_type", "default") not in _ROTATIONS:
            problems.append(
                f"the language model's rope_type is {rope['rope_type']}; it would have to be {' or '.join(_ROTATIONS)}."
            )
        if rope.get("partial_rotary_factor", 1) != 1:
            problems.append("the language model's partial_rotary_factor would have to be 1: all of each head rotates.")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and not found.windows and window < config.max_position_embeddings:
        problems.append(
            f"the language model's sliding_window is {window} tokens; it would have to be none, or at least "
            f"max_position_embeddings, {config.max_position_embeddings}."
        )
    return problems


def _rotations(config: Any) -> list[dict[str, Any]]:
    """Return the rotations of positions: one, or one for each kind of layer."""
    found = config.rope_parameters or {}
    return [found] if "rope_type" in found or not found else list(found.values())


def describe_language_model(config: Any, num_tokens: int) -> Callable[[gguf.GGUFWriter], None]:
    """Return a function that writes the hyperparameters of a language model."""
    found = ARCHITECTURES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = (config.rope_parameters or {}).get("full_attention", config.rope_parameters) or {}

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        writer.add_vocab_size(num_tokens)
        if found.windows:
            writer.add_sliding_window(config.sliding_window)
        if found.arch == MODEL_ARCH.PHI3:
            writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
            writer.add_sliding_window(0)
        if found.arch == MODEL_ARCH.GEMMA2:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)

    return write


def language_weights(model: VLM, kept: list[int]) -> dict[str, Tensor]:
    """Return the tensors of a VLM's language model under llama.cpp's names.

    Args:
        model: the VLM.
        kept: ids of the added tokens that get rows.

    Raises:
        UsageError: if gguf has no name for a tensor, or llama.cpp's model no place for it.
    """
    lm, config = model.lang_model, model.config.text_config
    found = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(found.arch, config.num_hidden_layers)
    tables: tuple[Any, Any] = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (table.weight for table in tables)
    rows = [token - model.config.first_added_id for token in kept]
    weights: dict[str, Tensor] = {}
    for name, x in lm.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UsageError(f"llama.cpp's {config.model_type} has no tensor like {name} of the language model.")
        weights[target] = _fit(name, x, found, config)
    first = model.config.first_added_id
    added = model.added_tokens
    scale = embedding_scale(model.lang_model.get_input_embeddings())
    weights["token_embd.weight"] = torch.cat([embedding[:first], added.embedding.weight[rows] / scale]).detach()
    if rows or found.needs_head or head.data_ptr() != embedding.data_ptr():
        if gguf.MODEL_TENSOR.OUTPUT not in gguf.MODEL_TENSORS[found.arch]:
            raise UsageError(
                f"llama.cpp's {config.model_type} has no head beside its table, and this model has one, for "
                f"{count_of(len(rows), 'added token')} or of its own. Leave the added tokens out when you build it."
            )
        weights["output.weight"] = torch.cat([head[:first], added.head.weight[rows]]).detach()
    return weights


def embedding_factor(model: VLM) -> float:
    """Return the factor by which a vision token is to be multiplied, for llama.cpp to have it as the model does.

    Some language models multiply embeddings by the root of their width: in the embedding, which a vision token does not
    pass, or behind it.
    """
    config = model.config.text_config
    found, root = ARCHITECTURES[config.model_type], math.sqrt(config.hidden_size)
    scales_itself = embedding_scale(model.lang_model.get_input_embeddings()) != 1
    ours = root if found.scales_embeddings and not scales_itself else 1.0
    return ours / root if found.scales_vision_tokens else ours


def _fit(name: str, x: Tensor, found: Architecture, config: Any) -> Tensor:
    """Bring a tensor of Transformers into llama.cpp's order."""
    if found.shifts_norms and name.endswith("norm.weight"):
        return x.float() + 1
    if found.rotates_neighbours and ".q_proj." in name:
        return _interleave(x, config.num_attention_heads)
    if found.rotates_neighbours and ".k_proj." in name:
        return _interleave(x, config.num_key_value_heads)
    return x


def _interleave(x: Tensor, num_heads: int) -> Tensor:
    """Put rows i and i + half of each head side by side: [h·k, …] -> [h·k, …]."""
    return x.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
