"""`FlopCount`: count the floating-point operations of what runs, by the formulas of torch's own counter.

A product of m x k with k x n numbers is 2·m·k·n operations. As in torch's counter, products of matrices and
convolutions count, and what works on single numbers (norms, activations, the scan of a state-space model) does not.
`torch.utils.flop_counter.FlopCounterMode` would also follow every module, which takes most of its time and fails where
a module is called without gradients on a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["FlopCount", "Work"]


class Work(NamedTuple):
    """What one operation of torch does: floating-point operations, and bytes that it reads and writes."""

    flops: int
    bytes: int


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    found: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return found


def _attend_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    found: int = sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)
    return found


def _attend_whole(query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *args: Any, **kwargs: Any) -> int:
    """Count a layer's projections and its attention: float[B, T, d] queries, float[B, S, d] keys and values."""
    B, T, S = *query.shape[:2], key.shape[1]
    products = 2 * B * (2 * T + 2 * S) * width**2
    found: int = products + sdpa_flop_count(*((B, heads, n, width // heads) for n in (T, S, S)))
    return found


_ATEN = torch.ops.aten
#: Torch's formulas, and those of fused attention on a CPU and in a frozen encoder, over which its counter passes.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attend,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attend_backward,
    _ATEN._native_multi_head_attention: _attend_whole,
}


class FlopCount(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        total: floating-point operations so far.
        works: of each operation of torch so far that computes something; a view computes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.works: list[Work] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        flops = self.count(func, args, kwargs, found)
        self.total += flops
        self._note(flops, [x for x in tree_iter((args, dict(kwargs))) if isinstance(x, Tensor)], found)
        return found

    def count(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> int:
        """Count the operations of a call by its formula; none without a formula."""
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", func))
        return 0 if formula is None else formula(*args, **kwargs, out_val=found)

    def _note(self, flops: int, inputs: list[Tensor], found: Any) -> None:
        """Note what an operation did, if it computed on a model's numbers and not on the host's counts and masks."""
        outputs = [x for x in tree_iter(found) if isinstance(x, Tensor)]
        given = {x.untyped_storage()._cdata for x in inputs}
        is_view = all(x.untyped_storage()._cdata in given for x in outputs) and not flops
        if any(x.is_meta for x in (*inputs, *outputs)) and (not is_view or _writes(found, inputs)):
            self.works.append(Work(flops, sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))))


def _writes(found: Any, inputs: list[Tensor]) -> bool:
    """Say whether an operation changed its first input in place: it returns that tensor itself."""
    return bool(inputs) and found is inputs[0]


def _bytes(tensor: Tensor) -> int:
    """Count what is read of a tensor: of one that repeats its numbers, each once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())
