"""Read files of tensors (.safetensors, .pt, .pth, .bin), and say why one was refused. Code in a file is never run."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from vlm_cli.errors import first_line

__all__ = ["describe_load_error", "read_shapes", "read_torch_file"]


def read_torch_file(path: Path) -> Any:
    """Read a file that `torch.save` wrote, to the CPU. It may hold tensors, numbers, texts, lists and dictionaries.

    Raises:
        Exception: if it holds anything else, or is damaged; `describe_load_error` says what.
    """
    import torch  # here, because `vlm list` reads towers' names and must answer at once

    # torch before 1.6 did not write zip files, and only zip files can be mapped into memory.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def read_shapes(path: Path) -> dict[str, Any]:
    """Read the tensors of a .safetensors or PyTorch file onto the meta device: their names and shapes, not their bytes.

    Raises:
        Exception: as of `read_torch_file`.
    """
    import torch

    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state: dict[str, Any] = torch.load(
        path, map_location="meta", weights_only=True, mmap=True if zipfile.is_zipfile(path) else None
    )
    return state


def describe_load_error(error: BaseException) -> str:
    """Say in a few words why a file of weights could not be loaded.

    torch and NumPy refuse files that hold code, and then explain at length how to run the code anyway. vlm does not
    pass this advice on.

    >>> describe_load_error(ValueError("Weights only load failed. Unsupported global: GLOBAL os.system"))
    'it holds os.system, which is code and no tensor'
    >>> describe_load_error(ValueError("If you trust the file you can load it unsafely using `allow_pickle=`"))
    'it is no complete file of tensors'
    >>> describe_load_error(ValueError("no such thing.\\nTry another."))
    'no such thing'
    """
    text = str(error)
    if refused := re.search(r"Weights only load failed.*?(?:GLOBAL|class|global) ([\w.]+)", text, re.DOTALL):
        return f"it holds {refused[1]}, which is code and no tensor"
    if "TorchScript" in text:
        return "it is a TorchScript archive, which holds code"
    advises = any(word in text for word in ("weights_only", "Weights only", "allow_pickle", "pickle"))
    if advises or isinstance(error, pickle.UnpicklingError):
        return "it is no complete file of tensors"
    return first_line(error)
