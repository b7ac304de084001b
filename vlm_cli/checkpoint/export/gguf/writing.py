"""Write a GGUF file, tensor by tensor, so that no second copy of the weights stands in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from vlm_cli.errors import CheckpointError

__all__ = ["Weights", "write_file"]

#: Name of a tensor -> the tensor, or a function that makes it.
Weights = Mapping[str, Tensor]

_KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_LARGEST_F16 = 65_504


def write_file(
    path: Path,
    arch: str,
    weights: Weights,
    out_type: str,
    describe: Iterable[Callable[[gguf.GGUFWriter], None]],
    *,
    exact: Iterable[str] = (),
) -> None:
    """Write a GGUF file.

    Args:
        path: the file; it must not exist.
        arch: llama.cpp's name of the architecture.
        weights: tensors by llama.cpp's names.
        out_type: a key of `OUT_TYPES`, for tensors with two axes or more; others are float32.
        describe: functions that write keys.
        exact: names of tensors that stay float32.

    Raises:
        CheckpointError: if a weight is not finite, or too large for the type.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_file_type(_FILE_TYPES[out_type])
    for write_keys in describe:
        write_keys(writer)
    kinds = {name: _choose_kind(x, name in exact, out_type) for name, x in weights.items()}
    for name, x in weights.items():
        empty = _convert(torch.zeros(1, x.shape[-1]), kinds[name])  # tells the bytes of a row
        rows = x.numel() // x.shape[-1]
        shape = [*x.shape[:-1], empty.shape[-1]] if empty.dtype == np.uint8 else [*x.shape]
        writer.add_tensor_info(name, shape, empty.dtype, empty.nbytes * rows, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, x in weights.items():
        _check_range(name, x, kinds[name])
        writer.write_tensor_data(_convert(x, kinds[name]))
    writer.close()


def _choose_kind(x: Tensor, is_exact: bool, out_type: str) -> Kind:
    if x.ndim < 2 or is_exact:
        return Kind.F32
    if x.ndim > 2 and out_type != "f32":  # llama.cpp convolves in F16 and F32 alone
        return Kind.F16 if out_type == "f16" else Kind.F32
    if out_type == "q8_0" and x.shape[-1] % 32:
        return Kind.F16
    return _KINDS[out_type]


def _convert(x: Tensor, kind: Kind) -> np.ndarray:
    array = x.detach().to("cpu", torch.float32).contiguous().numpy()
    if kind == Kind.F32:
        return array
    return array.astype(np.float16) if kind == Kind.F16 else gguf.quantize(array, kind)


def _check_range(name: str, x: Tensor, kind: Kind) -> None:
    largest = float(x.detach().abs().max()) if x.numel() else 0.0
    if not largest < float("inf"):
        raise CheckpointError(f"the weight {name} is not finite. Nothing was written; train or build the model again.")
    if kind == Kind.F16 and largest > _LARGEST_F16:
        raise CheckpointError(
            f"the weight {name} has values up to {largest:.0f}, more than float16 holds ({_LARGEST_F16:,}). Nothing "
            "was written. Choose --outtype bf16 or f32."
        )
