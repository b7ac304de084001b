"""Faster decoding of a loaded model: weights of few bits, a compiled step, attention for one position.

Nothing here runs unless the user asks for it; training, saving and a model's default results stay the same.
B batch, h heads, g key-value heads, S attended positions, k head width.
"""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm_cli.errors import LanguageModelLimit, VLMError, first_line
from vlm_cli.modeling.quantizing import quantize_model
from vlm_cli.modeling.vlm import VLM

__all__ = [
    "ONE_POSITION",
    "accelerate",
    "check_compiler",
    "compile_decoding",
    "compile_for",
    "use_one_position_attention",
]

ONE_POSITION = "sdpa_one_position"  # the name of `one_position_attention` in Transformers' tables


def accelerate(model: VLM, *, quantize: str | None = None, compile: bool = False) -> VLM:
    """Make a loaded model generate faster. Afterwards it can be neither trained nor saved.

    Args:
        model: on its device and in its dtype; changed in place.
        quantize: a name of `QUANTIZATIONS`; None keeps the weights.
        compile: compile the step that generates one token.

    Raises:
        VLMError: if the device, the language model or this machine does not support it.
    """
    model.merge_adapters()  # each would cost two products more for each layer and token
    if quantize is not None:
        quantize_model(model, quantize)
    if compile or model.dtype != torch.float32:
        use_one_position_attention(model)
    if compile:
        compile_decoding(model)
    return model


def one_position_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as Transformers' SDPA does, but with plain matrix products if there is one query position.

    float[B, h, 1, k] queries meet float[B, g, S, k] keys and values. On a CPU the products are several times faster
    than the fused kernel, above all in bfloat16. Compiled, they need no copy of keys and values for each head.
    """
    B, h, length, k = query.shape
    if length != 1 or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    q = query.reshape(B, key.shape[1], -1, k) * (k**-0.5 if scaling is None else scaling)
    scores = q @ key.transpose(2, 3)  # [B, g, h/g, S]
    if attention_mask is not None:
        mask = attention_mask
        if mask.shape[1] != 1:
            mask = mask.reshape(len(mask), key.shape[1], -1, mask.shape[-1])
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    out = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return out.reshape(B, 1, h, value.shape[-1]), None


def use_one_position_attention(model: VLM) -> None:
    """Switch a language model on the CPU from SDPA to `one_position_attention`, if Transformers can switch it.

    This registers the function in Transformers' tables, which all models of the process share; models that do not name
    it are unaffected.
    """
    lm = model.lang_model
    if model.device.type == "cpu" and lm.config._attn_implementation == "sdpa" and lm._can_set_attn_implementation():
        ALL_ATTENTION_FUNCTIONS.register(ONE_POSITION, one_position_attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ONE_POSITION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        lm.set_attn_implementation(ONE_POSITION)


def compile_decoding(model: VLM) -> None:
    """Compile the step that generates one token; `generate` then uses a static cache.

    The compiler runs once for each total length of prompt and answer, rounded up to 64 positions. On the CPU it packs
    the weights, which takes the memory of a second copy; on a GPU, a CUDA graph then holds the step.

    Raises:
        LanguageModelLimit: if Transformers cannot compile the language model.
        VLMError: if there is no compiler.
    """
    lm = model.lang_model
    if not lm._can_compile_fullgraph:
        raise LanguageModelLimit(
            f"a language model of type {lm.config.model_type} cannot be compiled as a whole in Transformers. Leave out "
            "--compile."
        )
    check_compiler()
    settings: Any = CompileConfig(fullgraph=True, mode=None)  # type: ignore[arg-type]  # torch takes None too
    if model.device.type == "cpu":
        settings.options = {"freezing": True}
        settings._compile_all_devices = True
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = settings


def check_compiler() -> None:
    """Check that torch finds a compiler.

    Raises:
        VLMError: if there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise VLMError(
            f"--compile needs a C++ compiler, and this machine has none: {first_line(error)}. Install g++ or clang++, "
            "set the variable CXX to a compiler, or leave out --compile."
        ) from None


def compile_for(model: VLM, **arguments: Any) -> float:
    """Compile for the shapes of one prompt and its answer, before `generate` answers the prompt.

    Args:
        model: a model that `compile_decoding` changed.
        arguments: of `generate`.

    Returns:
        Seconds.
    """
    started = time.monotonic()
    tokens = count(1)

    def are_enough(ids: Tensor, scores: Any) -> Tensor:
        # If a size differs between the second and the third step, such as the length of a sliding window, the compiler
        # runs again, and treats that size as variable from then on.
        return torch.full((len(ids),), next(tokens) == 4, device=ids.device)

    least = min(4, arguments.get("max_new_tokens", 4))
    model.generate(**arguments | {"min_new_tokens": least}, stopping_criteria=[are_enough])
    return time.monotonic() - started
