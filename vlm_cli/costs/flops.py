"""`FlopCount`: count the floating-point operations of what runs, by the formulas of torch's own counter.

A product of m x k with k x n numbers is 2·m·k·n operations. As in torch's counter, products of matrices and
convolutions count, and what works on single numbers (norms, activations, the scan of a state-space model) does not.
`torch.utils.flop_counter.FlopCounterMode` would also follow every module, which takes most of its time and fails where
a module is called without gradients on a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = ["FlopCount"]


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    found: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return found


#: Torch's formulas, and that of a CPU's fused attention, over which its counter passes.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attend,
}


class FlopCount(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        total: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._whole: set[Any] = set()  # operations that are not made of others

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        formula: Callable[..., int] | None = _FORMULAS.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            found = func(*args, **kwargs)
            self.total += formula(*args, **kwargs, out_val=found)
            return found
        if func not in self._whole:
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
            self._whole.add(func)
        return func(*args, **kwargs)
