"""Weights of few bits: the linear layers of the language model and of the fusion, which each token reads.

The vision encoder and the vision tokenizer run once per picture and keep their weights. Nothing here runs unless the
user asks for it; a quantized model can be neither trained nor saved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vlm_cli.errors import LanguageModelLimit, VLMError
from vlm_cli.modeling.quantizations import QUANTIZATIONS
from vlm_cli.modeling.vlm import VLM

__all__ = ["Int4Linear", "Int8Linear", "TorchaoLinear", "quantize_model", "quantized_bytes"]

_BLOCK = 64  # weights that share a scale in int4
_Linear = Callable[[Tensor, Tensor | None], nn.Module]


class _QuantizedLinear(nn.Module):
    """`nn.Linear` whose weights are kept in another form.

    Args:
        weight: float[out, in].
        bias: float[out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weights as float[out, in]."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weights as float[out, in], for models that read them."""
        return self.dequantized(self.dtype)


class Int8Linear(_QuantizedLinear):
    """int8 weights and a scale for each row of them, as in torchao's `Int8WeightOnlyConfig`, on the CPU.

    Inputs are rounded to bfloat16. torchao copies the weights into the input's dtype at every call; for a few rows,
    torch has a kernel that needs no copy.
    """

    int8: Tensor  # int8[out, in]
    scale: Tensor  # bfloat16[out]

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        weight = weight.detach().float().contiguous()
        # With more than 8 rows, converting the weights and multiplying matrices is faster. The kernel reads 16 columns
        # at a time; with another number of columns it would read past the end.
        self.most_rows = 8 if weight.shape[1] % 16 == 0 else 0
        # Round the scale before dividing by it, so that its rounding adds no error.
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
        self.register_buffer("int8", (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
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


class Int4Linear(_QuantizedLinear):
    """Weights in the 16 values of NF4 (QLoRA, arXiv:2305.14314), and a scale for each 64 of them, by bitsandbytes."""

    packed: Tensor  # uint8[⌈out·in / 2⌉, 1]
    scale: Tensor  # float32[⌈out·in / 64⌉]

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__(weight, bias)
        packed, state = quantize_4bit(weight.detach().contiguous(), blocksize=_BLOCK, quant_type="nf4")
        self.register_buffer("packed", packed)
        self.register_buffer("scale", state.absmax)
        self.state = state

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.packed, self.state)
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """float[*, in] -> float[*, out]."""
        import bitsandbytes

        out: Tensor = bitsandbytes.matmul_4bit(x, self.packed.t(), quant_state=self.state)  # type: ignore[attr-defined]
        return out if self.bias is None else out + self.bias


class TorchaoLinear(_QuantizedLinear):
    """Weights as a tensor of torchao's.

    Args:
        config: the name of one of torchao's configurations, such as "Float8WeightOnlyConfig".
        weight: float[out, in].
        bias: float[out], or None.
    """

    def __init__(self, config: str, weight: Tensor, bias: Tensor | None) -> None:
        import torchao.quantization

        super().__init__(weight, bias)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        settings = getattr(torchao.quantization, config)()
        torchao.quantization.quantize_(linear, settings, filter_fn=lambda module, name: True)
        self.quantized = linear.weight

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = self.quantized.dequantize()
        return weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """float[*, in] -> float[*, out]."""
        return nnf.linear(x, self.quantized, self.bias)


@contextmanager
def _without_downloaded_code() -> Iterator[None]:
    """Hide the package `kernels`, through which bitsandbytes would fetch programs from the hub when it is imported."""
    hidden = sys.modules.get("kernels", sys)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if hidden is not sys:
            sys.modules["kernels"] = hidden


def _way(name: str, device: torch.device) -> _Linear:
    """Return what makes a layer of few bits.

    Raises:
        VLMError: if a package that does it is missing.
    """
    if name == "int8" and device.type == "cpu":
        return Int8Linear
    package = QUANTIZATIONS[name]
    try:
        with _without_downloaded_code():
            import_module(package)
    except ImportError:
        raise VLMError(
            f"--quantize {name} on {device.type} needs the package {package}, which is missing: "
            "pip install 'vlm-cli[quantize]'"
        ) from None
    if name == "int4":
        return Int4Linear
    config = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[name]
    return partial(TorchaoLinear, config)


@torch.no_grad()
def quantize_model(model: VLM, name: str) -> None:
    """Keep the linear layers of the language model and of the fusion in few bits.

    Args:
        model: on its device and in its dtype; changed in place.
        name: a key of `QUANTIZATIONS`.

    Raises:
        VLMError: if a package is missing.
        LanguageModelLimit: if the language model has no linear layer besides its head.
    """
    make = _way(name, model.device)
    head = model.lang_model.get_output_embeddings()
    found = list(_linear_layers(model))
    if not any(module is not head for part, _, module in found if part is model.lang_model):
        raise LanguageModelLimit(
            f"a language model of type {model.lang_model.config.model_type} has no linear layers to keep in {name}. "
            "Leave out --quantize."
        )
    for part, path, module in found:
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        quantized = make(weight, module.bias)
        for kind in (
            "_forward_pre_hooks",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks",
            "_forward_hooks_with_kwargs",
        ):
            setattr(quantized, kind, getattr(module, kind))  # the hook of VLM at the head
        part.set_submodule(path, quantized)


def quantized_bytes(model: VLM, name: str, dtype: torch.dtype) -> dict[str, int]:
    """Count the bytes of each part's weights after `quantize_model`. The model may be on the meta device.

    Args:
        model: not quantized.
        name: a key of `QUANTIZATIONS`.
        dtype: of the weights that stay as they are.
    """
    sizes: dict[int, int] = {}
    for _, _, module in _linear_layers(model):
        out, columns = module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
        number = out * columns
        sizes[id(module)] = {
            "int8": number + out * torch.bfloat16.itemsize,
            "int4": -(-number // 2) + -(-number // _BLOCK) * torch.float32.itemsize,
            "fp8": number + out * torch.float32.itemsize,
        }[name]
    counted: set[int] = set()
    return {part: _bytes_within(module, sizes, dtype, counted) for part, module in model.part_modules().items()}


def _bytes_within(part: nn.Module, sizes: dict[int, int], dtype: torch.dtype, counted: set[int]) -> int:
    """Count the bytes of a part. A head that shares its table leaves the table behind, and has weights of its own."""
    total = 0
    for module in part.modules():
        total += sizes.get(id(module), 0)
        for name, parameter in module.named_parameters(recurse=False):
            replaced = id(module) in sizes and name == "weight"
            if not replaced and id(parameter) not in counted:
                counted.add(id(parameter))
                total += parameter.numel() * dtype.itemsize
    return total


def _linear_layers(model: VLM) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield the linear layers that each token reads: the part, the path in it, and the layer."""
    for part in (model.lang_model, model.fusion):
        yield from ((part, path, module) for path, module in list(part.named_modules()) if _is_linear(module))


def _is_linear(module: nn.Module) -> bool:
    """Say whether a layer only multiplies by a matrix. A subclass of `nn.Linear` may do more; falcon's does not.

    Its `forward` is tried on small weights, so that the layer may be on the meta device.
    """
    kind = type(module)
    if kind in (nn.Linear, Conv1D) or not isinstance(module, nn.Linear):
        return kind in (nn.Linear, Conv1D)
    x, weight, bias = torch.linspace(-1, 1, 3)[None], torch.linspace(-1, 1, 6).reshape(2, 3), torch.tensor([0.5, -0.5])
    layer: Any = SimpleNamespace(weight=weight, bias=bias, in_features=3, out_features=2)
    try:
        found = kind.forward(layer, x)
    except (AttributeError, TypeError, RuntimeError):  # it needs more than weights
        return False
    plain = nnf.linear(x, weight, bias)
    return isinstance(found, Tensor) and found.shape == plain.shape and torch.allclose(found, plain, atol=1e-5)
