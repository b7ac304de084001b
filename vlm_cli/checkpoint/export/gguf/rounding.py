"""The numbers of llama.cpp: let a model round as llama.cpp's CPU code does, so that both give the same logits.

llama.cpp looks GELU and QuickGELU up in a table of float16, for the tanh approximation of GELU alone, and convolves the
pixels of patches in float16, whatever the file holds. With both in place, the embeddings of a picture agree to the last
digit that llama.cpp prints (measured with build 11549).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as nnf
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from transformers import activations

from vlm_cli.modeling.vlm import VLM

__all__ = ["rounding_as_llama_cpp"]

_GELU = (nn.GELU, activations.GELUActivation, activations.GELUTanh, activations.NewGELUActivation)
_QUICK = (QuickGELU, activations.QuickGELUActivation)
_TABLE = 10.0  # beyond it the table of GELU is not asked


@contextmanager
def rounding_as_llama_cpp(model: VLM, *, splits_linear: bool = False) -> Iterator[None]:
    """Let a float32 model round as llama.cpp does, inside the block.

    Args:
        model: the model.
        splits_linear: whether the file holds a linear vision tokenizer as two maps with a GELU between.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _GELU):
                stack.enter_context(_replaced_output(module, _gelu))
            elif isinstance(module, _QUICK):
                stack.enter_context(_replaced_output(module, _quick_gelu))
        tokenizer: Any = model.vision_tokenizer
        if splits_linear and isinstance(tokenizer.proj, nn.Linear):
            handle = tokenizer.proj.register_forward_hook(lambda _, args, y: _gelu(y) - _gelu(-y))
            stack.callback(handle.remove)
        patches = next(m for m in model.vision_encoder.modules() if isinstance(m, nn.Conv2d))
        stack.enter_context(_rounded_convolution(patches))
        yield


def _gelu(x: Tensor) -> Tensor:
    found = nnf.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -_TABLE, torch.zeros_like(x), torch.where(x >= _TABLE, x, found))


def _quick_gelu(x: Tensor) -> Tensor:
    rounded = x.half().float()
    return (rounded * torch.sigmoid(1.702 * rounded)).half().float()


@contextmanager
def _replaced_output(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, args, output: function(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _rounded_convolution(module: nn.Conv2d) -> Iterator[None]:
    before = module.weight.data
    module.weight.data = before.half().float()
    handle = module.register_forward_pre_hook(lambda _, args: (args[0].half().float(),))
    try:
        yield
    finally:
        handle.remove()
        module.weight.data = before
