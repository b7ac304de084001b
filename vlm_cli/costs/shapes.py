"""`ShapesOnly`: run a model on the meta device as it would run on numbers.

A model whose weights are on the meta device computes shapes. But what it does may depend on its inputs: which text
reads which picture, where a picture is cut, whether a mask hides anything. So ids, masks and counts stay real here, on
the CPU, and only what meets a weight becomes a shape:

    ids        CPU      [[81, 5, 7]]
    embedding  meta     float[1, 3, 4096]       the ids join the weights as a shape
    ids == 81  CPU      [[True, False, False]]  the model may look at it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["ShapesOnly"]

#: Numbers in one tensor beyond which only its shape is kept: a mask of so many positions is not worth its memory.
MOST_NUMBERS = 2**24

_MOVING = torch.ops.aten._to_copy.default
_FILLING = {
    getattr(torch.ops.aten, name).default
    for name in ("new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like")
}
_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class ShapesOnly(TorchDispatchMode):
    """While it is entered, an operation of a meta tensor with tensors of the CPU gives a meta tensor.

    Whole numbers and truth values that a model makes from nothing are real, whatever device it asks for, and a tensor
    that it moves to another device stays where it is.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(_tensors_of((args, kwargs.values())))
        if func is _MOVING:
            return func(*args, **kwargs | {"device": tensors[0].device})
        if not tensors or func in _FILLING:
            return _fill(func, args, kwargs)
        num_shapes = sum(x.is_meta for x in tensors)
        if not num_shapes:
            found = func(*args, **kwargs)
            return found.to("meta") if isinstance(found, Tensor) and found.numel() > MOST_NUMBERS else found
        if num_shapes == len(tensors):
            return func(*args, **kwargs)
        if func in _INDEXING:
            args = (args[0], _as_numbers(args[1]), *args[2:])
        args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _tensors_of(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, Iterable) and not isinstance(x, str):
            yield from _tensors_of(x)


def _fill(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a tensor of one number: of whole numbers and truth values on the CPU, unless it is huge."""
    found = func(*args, **kwargs)
    is_shape = isinstance(found, Tensor) and found.is_meta
    if not is_shape or found.is_floating_point() or found.numel() > MOST_NUMBERS:
        return found
    return func(*args, **kwargs | {"device": torch.device("cpu")})


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replace masks by the numbers of what they keep: only a mask that can be read has a known number of them."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
