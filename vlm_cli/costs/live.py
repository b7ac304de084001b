"""`LiveBytes`: the bytes of the tensors that exist while something runs, on shapes as on numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["LiveBytes", "count_weights"]


class LiveBytes(TorchDispatchMode):
    """While it is entered, follows every tensor that an operation makes until nobody holds it any more.

    What an operation needs inside, and gives back before it returns, it does not see.

    Args:
        known: tensors that do not count, such as the weights.

    Attributes:
        now: bytes that exist.
        peak: most bytes that existed.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._followed: dict[int, Any] = {}
        self._known = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_iter(found):
            if isinstance(x, Tensor):
                self.follow(x)
        return found

    def follow(self, tensor: Tensor) -> None:
        """Count a tensor from now on."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._followed or key in self._known or not size:
            return

        def forget(_: Any) -> None:
            del self._followed[key]
            self.now -= size

        self._followed[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def count_weights(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors; those that share their memory count once."""
    storages = (x.untyped_storage() for x in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
