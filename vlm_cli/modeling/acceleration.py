"""Faster decoding of a loaded model, for those who ask: int8 weights, a compiled step, attention for one position.

What trains, what is saved and what a model computes by default stay as they are.
B batch, h heads, g key-value heads, S positions read, k head width.
"""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import CompileConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from vlm_cli.errors import LanguageModelLimit, VLMError, first_line
from vlm_cli.modeling.vlm import VLM

__all__ = [
    "QUANTIZATIONS",
    "Int8Linear",
    "accelerate",
    "compile_decoding",
    "compile_for",
    "quantize_int8",
    "use_one_position_attention",
]

_ATTENTION = "sdpa_one_position"


def accelerate(model: VLM, *, quantize: str | None = None, compile: bool = False) -> VLM:
    """Change a loaded model for generation; it can then be neither trained nor saved.

    Args:
        model: on its device and in its dtype; changed in place.
        quantize: a name of `QUANTIZATIONS`.
        compile: compile the step that writes one token.

    Raises:
        VLMError: if its device, the language model or this machine does not allow it.
    """
    if quantize is not None:
        QUANTIZATIONS[quantize](model)
    if compile or model.dtype != torch.float32:
        use_one_position_attention(model)
    if compile:
        compile_decoding(model)
    return model


def one_position_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' SDPA, but for one new position plain products of float[B, h, 1, k] with float[B, g, S, k].

    On a CPU these are several times faster than the fused kernel, most of all in bfloat16, and compiled they need no
    copy of keys and values for each head.
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


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, one_position_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def use_one_position_attention(model: VLM) -> None:
    """Let a language model on the CPU use `one_position_attention`, where it uses SDPA by Transformers' interface."""
    lm = model.lang_model
    if model.device.type == "cpu" and lm.config._attn_implementation == "sdpa" and lm._can_set_attn_implementation():
        lm.set_attn_implementation(_ATTENTION)


class Int8Linear(nn.Module):
    """`nn.Linear` with int8 weights and a scale for each of their rows, as torchao's `Int8WeightOnlyConfig`.

    Inputs are rounded to bfloat16. torchao makes a copy of the weights in the input's dtype at every call; for few rows
    torch has a kernel that does not.

    Args:
        weight: float[out, in].
        bias: float[out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dtype = weight.dtype
        weight = weight.detach().float().contiguous()
        # From more rows on it is faster to convert the weights and multiply matrices. The kernel reads 16 columns at a
        # time, and beyond the end of others.
        self.most_rows = 8 if weight.shape[1] % 16 == 0 else 0
        # Rounded before it divides, so that its rounding is no error of its own.
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
        self.register_buffer("int8", (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """float[out, in], for models that look at it."""
        return self._dequantized(self.dtype)

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.int8.to(dtype) * self.scale[:, None].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """float[*, in] -> float[*, out]."""
        rows = x.flatten(0, -2).to(torch.bfloat16)
        if len(rows) <= self.most_rows:
            out = torch._weight_int8pack_mm(rows, self.int8, self.scale)
        else:
            out = nnf.linear(rows, self.int8.to(torch.bfloat16)) * self.scale
        out = out.to(x.dtype).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def quantize_int8(model: VLM) -> None:
    """Keep what every token reads, the language model's linear layers and the fusion's, in a byte for each weight.

    Raises:
        VLMError: on another device than the CPU.
        LanguageModelLimit: if the language model has no layer of a kind that is known.
    """
    if model.device.type != "cpu":
        raise VLMError(
            f"int8 weights are for the CPU, and the model is on {model.device.type}. There, load it with Transformers' "
            "own quantization_config."
        )
    for part in (model.lang_model, model.fusion):
        for name, module in list(part.named_modules()):
            if not _is_linear(module):
                continue
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            quantized = Int8Linear(weight, module.bias)
            for kind in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs"):
                setattr(quantized, kind, getattr(module, kind))  # ours, at the head
            part.set_submodule(name, quantized)
    head = model.lang_model.get_output_embeddings()
    if not any(isinstance(x, Int8Linear) for x in model.lang_model.modules() if x is not head):
        raise LanguageModelLimit(
            f"a language model of type {model.lang_model.config.model_type} has no linear layers that could be kept "
            "in int8. Leave out --quantize."
        )


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a layer is a product with a matrix; a subclass of `nn.Linear` may do more (falcon's does not)."""
    kind = type(module)
    if kind in (nn.Linear, Conv1D) or not isinstance(module, nn.Linear):
        return kind in (nn.Linear, Conv1D)
    x = torch.linspace(-1, 1, module.in_features).to(module.weight)[None]
    try:
        found = kind.forward(module, x)
    except (TypeError, RuntimeError):  # it is called with something else
        return False
    plain = nnf.linear(x, module.weight, module.bias)
    return isinstance(found, Tensor) and found.shape == plain.shape and torch.allclose(found, plain, atol=1e-5)


def compile_decoding(model: VLM) -> None:
    """Compile the step that writes one token; `generate` then uses a static cache.

    Each length of prompt and answer together waits once for the compiler. Weights are packed for the CPU, which is a
    second copy of them.

    Raises:
        LanguageModelLimit: if Transformers cannot compile the language model.
        VLMError: if there is no compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    lm = model.lang_model
    if not lm._can_compile_fullgraph:
        raise LanguageModelLimit(
            f"a language model of type {lm.config.model_type} cannot be compiled as a whole in Transformers. Leave out "
            "--compile."
        )
    try:
        get_cpp_compiler()
    except Exception as error:
        raise VLMError(
            f"there is no C++ compiler for --compile: {first_line(error)}. Install g++ or clang++, name one in the "
            "variable CXX, or leave out --compile."
        ) from None
    settings = CompileConfig(fullgraph=True, mode=None)
    if model.device.type == "cpu":
        settings.options = {"freezing": True}
        settings._compile_all_devices = True
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = settings


def compile_for(model: VLM, **arguments: Any) -> float:
    """Compile for the shapes of a prompt and its answer, before it is answered.

    Args:
        model: after `compile_decoding`.
        arguments: of `generate`.

    Returns:
        The seconds that it took.
    """
    started = time.monotonic()
    tokens = count(1)

    def are_enough(ids: Tensor, scores: Any) -> Tensor:
        # What differs between the second and the third step, as the length of a sliding window does, is compiled anew,
        # and from then on may differ.
        return torch.full((len(ids),), next(tokens) == 4, device=ids.device)

    least = min(4, arguments.get("max_new_tokens", 4))
    model.generate(**arguments | {"min_new_tokens": least}, stopping_criteria=[are_enough])
    return time.monotonic() - started


#: Ways to keep weights in fewer bytes, by their names in `--quantize`.
QUANTIZATIONS = {"int8": quantize_int8}
