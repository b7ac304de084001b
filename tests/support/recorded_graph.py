"""A CUDA graph on a CPU: the operations of one run, with the tensors that they read and wrote, run again.

As in a CUDA graph, no line of Python runs again, each tensor stays where it is, and the host sees no number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["HostLooks", "Recording", "record"]

#: Operations after which the host waits for a device that holds their inputs.
WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "multinomial")


class HostLooks(RuntimeError):
    """The host looked at a number."""


def waits(function: Any, args: tuple[Any, ...]) -> bool:
    """Say whether the host waits for the result of an operation."""
    name = function.__name__.split(".")[0]
    is_mask = name in ("index", "index_put", "index_put_") and any(
        x is not None and x.dtype == torch.bool for x in args[1]
    )
    return name in WAITING or is_mask


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Records operations, and refuses those after which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(function, args):
            raise HostLooks(f"{function.__name__} in a graph")
        for given, argument in zip(args, function._schema.arguments, strict=False):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and id(given) not in self._before:
                self._before[id(given)] = given, given.clone()
        out = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, out))
        return out

    def restore(self) -> None:
        """Undo what the recorded run wrote: capturing runs nothing."""
        for tensor, before in reversed(self._before.values()):
            tensor.copy_(before)

    def replay(self) -> None:
        for function, args, kwargs, out in self.operations:
            new = function(*args, **kwargs)
            given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor) and storage(old) not in given:  # neither a view nor a change in place
                    old.copy_(value)


def record(run: Callable[[], None]) -> Callable[[], None]:
    """Capture a function, as `StaticStep` captures its step on a GPU."""
    recording = Recording()
    with recording:
        run()
    recording.restore()
    return recording.replay
