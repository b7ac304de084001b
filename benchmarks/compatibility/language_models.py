"""The smallest model of each causal language model type of Transformers, made from its own configuration class.

Sizes follow from the names of the fields, so that a type that Transformers adds needs nothing here. What a class checks
beyond that stands in `_SPECIAL`, with nothing else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN, UNSUITABLE_LANGUAGE_MODELS, Composition
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.fusion.gates import is_gate
from vlm_cli.modeling.towers import find_tower_shape
from vlm_cli.modeling.vlm import VLM

__all__ = ["VOCABULARY", "model_types", "tiny_config", "tiny_vlm"]

VOCABULARY = 80  # tokens
DEPTH = 2  # layers

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")

#: Pattern of a field's whole name -> its size; the first that matches counts. Sizes are never raised.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|num_blocks|num_layers_per_stack", DEPTH),
    (r"max_window_layers|n_groups?|mamba_n_groups|topk_group|num_dense_layers", 1),
    (r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length", 128),
    (
        r"hidden_size|n_embd|d_model|embedding_dim|word_embed_proj_dim|lru_width|adapter_in(put_size|_dim)|adapter_out_dim",
        32,
    ),
    (r"attention_hidden_size|mamba_d_ssm", 64),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size|dff).*", 48),
    (r".*(num_attention_heads|n_heads?|num_heads|attention_heads|num_(key|value)_heads)", 4),
    (r"mamba_(d_head|head_dim)|qk_head_dim|attention_head_dim", 16),  # twice the usual width
    (r".*(head_dim|head_size|kv_channels|rotary_dim)", 8),
    (r".*(state_size|d_state|lora_rank|dt_rank|time_step_rank|lowrank|adapter_rank|laurel_rank)", 8),
    (r".*(sliding_window.*|window_size)|attention_chunk_size|local_attention", 5),
    (r"(mamba_)?chunk_size", 4),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok|moe_topk|moe_k", 2),
    (r"initializer_range|init_std", 0.2),  # large enough for every token to matter
    (r".*(dropout|pdrop|jitter_noise).*", 0.0),
)
#: Fields that are set even where the class's own default is None.
_NEEDED = ("head_dim", "num_experts", "n_routed_experts", "num_experts_per_tok")

_TEXT_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_SHARED_CACHE = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 80,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "ple_embed_dim": 32,
}
_WINDOWED = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_qk_nope_head_dim": 8,
    "swa_qk_rope_head_dim": 8,
    "swa_v_head_dim": 8,
    "swa_head_dim": 16,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 32}},
    # Beyond this many keys, what a token sees depends in Transformers on how many follow.
    "doge": {"keep_window_size": 2048},
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": _WINDOWED},
    "dots3_note_text": _WINDOWED,
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n": {"text_config": _SHARED_CACHE},
    "gemma3n_text": _SHARED_CACHE,
    "gemma4": {"text_config": {"pad_token_id": 0}},
    "gemma4_unified": {"text_config": {"pad_token_id": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _HYBRID,
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "moshi": {"sliding_window": 64},  # Transformers' cache is wrong once its window is full
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "pad_token_id": 0,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
    },
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # rounded up to multiples of 64 in some places only
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def model_types() -> list[str]:
    """Types that the language model of a VLM may have."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(UNSUITABLE_LANGUAGE_MODELS))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of a few layers, 32 channels and `VOCABULARY` tokens, without tokens that end a text."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_merged(_shrunk(config_class()), _SPECIAL.get(model_type, {})))


def tiny_vlm(model_type: str, fusion: str, *, seed: int = 0) -> VLM:
    """A VLM of the smallest parts around that language model, with random weights that make media matter."""
    vision = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    }
    parts = Composition.compose(
        None,
        {
            "vision_encoder": "tiny",
            "vision_tokenizer": {"type": "perceiver", "depth": 2, "num_heads": 2, "head_dim": 8, "num_latents": 3},
            "fusion": {"type": fusion, **({} if fusion == "language-stream" else {"num_heads": 2, "head_dim": 8})},
            "language_model": model_type,
            "added_tokens": [END_OF_CHUNK, MEDIA_TOKEN],
        },
    )
    num_patches, dim = find_tower_shape(vision)
    config = VLMConfig(
        text_config=tiny_config(model_type),
        vision_config=vision | {"num_patches": num_patches, "dim": dim},
        composition=parts,
        added_tokens=list(parts.added_tokens),
        first_added_id=VOCABULARY,
        media_token_id=VOCABULARY + 1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = VLM(config).eval()
    with torch.no_grad():
        for part in (model.vision_encoder, model.vision_tokenizer, model.fusion, model.added_tokens):
            for name, parameter in part.named_parameters():
                if not is_gate(name):
                    parameter += 0.2 * torch.randn_like(parameter)
    return model


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    nested = {k: _merged(base[k], x) for k, x in over.items() if isinstance(x, dict) and isinstance(base.get(k), dict)}
    return {**base, **over, **nested}


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that make a small configuration of the same class."""
    # A configuration whose layers differ forbids reading some of its attributes.
    values = {field.name: vars(config).get(field.name) for field in dataclasses.fields(config)}
    depth = next((values[name] for name in _DEPTHS if values.get(name) is not None), None)
    small: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = field.name, values[field.name]
        if isinstance(value, PreTrainedConfig):
            small[name] = _shrunk(value)
        elif isinstance(value, (list, tuple)):
            if len(value) == depth:
                small[name] = _kinds(value)
        elif name in _TEXT_TOKENS:
            small[name] = None if "None" in str(field.type) else 0
        elif name.endswith(("num_key_value_heads", "num_kv_heads")) and value is not None:
            small[name] = 4 if value == values.get("num_attention_heads") else min(2, value)
        elif not isinstance(value, (bool, str, dict)) and (size := _size(name, value)) is not None:
            small[name] = size
    return small


def _kinds(values: Sequence[Any]) -> list[Any]:
    """What is said of each of `DEPTH` layers, every kind first."""
    kinds = [x for i, x in enumerate(values) if x not in values[:i]]
    return (kinds * DEPTH)[:DEPTH]


def _size(name: str, value: Any) -> Any:
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
    if size is None or value is None:
        return size if name in _NEEDED else None
    # Fields are checked for their types: the dropout of MPT is a whole number.
    return type(value)(size if size < 1 or value <= 0 else min(size, value))
