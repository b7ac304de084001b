"""Stop a model that grows beyond what its weights hold, while PyTorch builds the model.

A configuration is a few bytes, and may ask for a billion layers or for more memory than any machine has. PyTorch tells
a hook about each tensor before the tensor's memory is filled, so that this module counts along:

    with limited_size("'my-vlm'", [Path("my-vlm/model.safetensors")]):
        VLM.from_pretrained("my-vlm")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from vlm_cli.errors import CheckpointError

__all__ = ["MOST_TENSORS", "check_files_fit", "check_free_memory", "check_memory", "limited_size", "weight_files"]

MOST_TENSORS = 200_000  # of one model; one with 671 billion parameters has 91,000
_MOST_MODULES = 1_000_000
_SLACK = 64 << 20  # elements that a model may have beyond its files: tables of positions, a text tower
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@contextmanager
def limited_size(name: str, files: Sequence[Path] = (), *, elements_per_byte: int = 1) -> Iterator[None]:
    """Refuse a model, built inside the block, that has more elements than its files can hold.

    Args:
        name: how the message names the model.
        files: its weight files. Without files, only the number of tensors is limited.
        elements_per_byte: how many elements a byte of the files may hold; more than 1 only for quantized weights.

    Raises:
        CheckpointError: inside the block, as soon as the model is too large.
    """
    held = sum(file.stat().st_size for file in files)
    most = held * elements_per_byte + _SLACK if held else None
    counter = _Counter(name, held, most)
    handles = [
        register_module_parameter_registration_hook(counter.count),
        register_module_buffer_registration_hook(counter.count),
        register_module_module_registration_hook(counter.count_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Counter:
    """Counts the tensors of modules as they are made; a tensor that replaces another is not counted again."""

    def __init__(self, name: str, held: int, most: int | None) -> None:
        self.name, self.held, self.most = name, held, most
        self.elements = self.tensors = self.modules = 0
        self.seen: dict[int, tuple[nn.Module, set[str]]] = {}  # it keeps the modules, so that no id is used twice

    def count(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        names = self.seen.setdefault(id(module), (module, set()))[1]
        if tensor is None or name in names:
            return
        names.add(name)
        self.tensors += 1
        self.elements += tensor.numel()
        if self.tensors > MOST_TENSORS:
            raise CheckpointError(
                f"the configuration of {self.name} asks for more than {MOST_TENSORS:,} tensors. Check its number of "
                "layers."
            )
        if self.most is not None and self.elements > self.most:
            raise CheckpointError(
                f"the configuration of {self.name} asks for more than {self.most:,} numbers, and its weight files have "
                f"{self.held:,} bytes. Check its sizes (layers, widths, vocabulary), or fetch it again."
            )

    def count_module(self, module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        self.modules += 1
        if self.modules > _MOST_MODULES:
            raise CheckpointError(
                f"the configuration of {self.name} asks for more than {_MOST_MODULES:,} modules. Check its number of "
                "layers."
            )


def weight_files(place: str | Path) -> list[Path]:
    """List the weight files in a directory, or the file itself; empty for a hub id."""
    path = Path(place)
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    return [file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file()]


def check_memory(model: nn.Module, name: str) -> None:
    """Check that this machine can hold a model that is on the meta device.

    Raises:
        CheckpointError: if it cannot.
    """
    needed = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    if needed > (here := _all_memory()):
        raise CheckpointError(
            f"{name} would take {needed / 1e9:,.0f} GB, and this machine has {here / 1e9:,.0f} GB. Choose smaller "
            "parts or settings."
        )


def check_files_fit(place: str) -> None:
    """Check that this machine can hold the weights in a directory; those of a hub id are not known here.

    Raises:
        CheckpointError: if it cannot.
    """
    needed = sum(file.stat().st_size for file in weight_files(place))
    if needed > (here := _all_memory()):
        raise CheckpointError(
            f"the weights in {place!r} take {needed / 1e9:,.1f} GB, and this machine has {here / 1e9:,.1f} GB of "
            "memory. Choose a smaller model or a machine with more memory; from Python, load(…, device_map=…) puts "
            "parts of it elsewhere."
        )


def check_free_memory(needed: float, what: str, advice: str) -> None:
    """Check that a step has memory, beside what is in use.

    Args:
        needed: bytes.
        what: the step.
        advice: what to do if there is too little.

    Raises:
        CheckpointError: if there is too little.
    """
    if needed > (free := _free_memory()):
        raise CheckpointError(
            f"{what} takes {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free. {advice}"
        )


def _free_memory() -> int:
    return psutil.virtual_memory().available + psutil.swap_memory().free


def _all_memory() -> int:
    return psutil.virtual_memory().total + psutil.swap_memory().total
