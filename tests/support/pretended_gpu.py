"""A GPU that is not there: its tensors have shapes and no numbers, so that what would wait for numbers fails.

Tensors of the CPU are real. `torch`'s own fake tensors stand for those of the GPU: they know their device, refuse
operations between devices, and have no numbers that a process could look at.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

__all__ = ["GPU", "PretendedGPU", "Waits", "pretended_gpu"]

GPU = torch.device("cuda:0")


class Waits(RuntimeError):
    """A process would wait for the GPU."""


class PretendedGPU(TorchDispatchMode):
    """Runs operations on the GPU without numbers, and those on the CPU as always."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if not any(isinstance(x, FakeTensor) for x in tensors) and "cuda" not in devices:
            with _disable_current_modes():
                return function(*args, **kwargs)
        self._check(function.__name__.split(".")[0], devices, args, kwargs)
        with self.fake:
            return function(*args, **kwargs)

    def _check(self, name: str, devices: set[str], args: Any, kwargs: Any) -> None:
        """Refuse what FakeTensorMode allows, and for which a process would wait.

        Raises:
            Waits: for a copy from the GPU, one to it that blocks, or an index that would be copied.
        """
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(isinstance(x, Tensor) and (x.device.type == "cpu" or x.dtype == torch.bool) for x in indices):
            raise Waits(f"{name} by a mask, or by numbers that are on the CPU")
        if name not in ("_to_copy", "copy_") or len(devices) < 2:
            return
        target = args[0].device.type if name == "copy_" else torch.device(kwargs["device"]).type
        if target != "cuda":
            raise Waits("a copy from the GPU")
        source = args[1] if name == "copy_" else args[0]
        if source.ndim and not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
            raise Waits("a copy to the GPU that blocks")

    def copied(self, model: Any) -> Any:
        """Return a copy of a model that is on the GPU."""
        with _disable_current_modes():
            model = copy.deepcopy(model)
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, x in list(held.items()):
                    if x is not None:
                        with self.fake:
                            there = torch.empty(x.shape, dtype=x.dtype, device=GPU)
                        held[name] = nn.Parameter(there, requires_grad=False) if held is module._parameters else there
        return model


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Make a GPU that is there within the block."""
    gpu = PretendedGPU()
    with gpu.fake, gpu:
        yield gpu
