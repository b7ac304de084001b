"""Modules on the meta device, which have shapes and no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["SkipsFilling", "meta_device"]

#: What draws or sets the first weights of a module, in place.
_FILLING = {
    *(getattr(nn.init, name) for name in nn.init.__dict__ if name.endswith("_") and not name.startswith("_")),
    *(getattr(Tensor, name) for name in ("normal_", "uniform_", "zero_", "fill_", "erfinv_", "clamp_", "mul_", "add_")),
}


class SkipsFilling(TorchFunctionMode):
    """Leave meta tensors as they are where a module fills its weights; other tensors are filled.

    A meta tensor has nothing to fill. Torch would find this out in Python for each tensor, which takes most of the time
    in which a model is built there.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _FILLING:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_device() -> Iterator[None]:
    """Build modules on the meta device, and do not fill their weights."""
    with torch.device("meta"), SkipsFilling():
        yield
