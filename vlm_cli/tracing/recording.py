"""Record attention while a module runs: the weights of each head, averaged, whoever computes them.

Two ways, which see the same numbers:

- `scaled_dot_product_attention` of torch returns no weights, so they are computed again from its arguments;
- a module of Transformers that computes attention itself ("eager") returns its weights.

B rows, h heads, T queries, S keys, k head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Recording", "attention_weights", "record_attention"]

_PRODUCT = nn.functional.scaled_dot_product_attention
_TOLERANCE = 1e-2  # by which a row's sum may exceed 1, in half precision


@dataclass
class Recording:
    """Attention of the modules that were watched.

    Attributes:
        weights: for each module, by its key, the weights float[B, T, S] of each time that attention was computed inside
            of it, averaged over heads, in float32 on the CPU.
    """

    weights: dict[Any, list[Tensor]] = field(default_factory=dict)
    _returned: set[Any] = field(default_factory=set)  # keys of modules that return weights
    _running: list[Any] = field(default_factory=list)  # keys of modules that run now, the innermost last

    def add_product(self, weights: Tensor) -> None:
        """Note the weights of a product inside the innermost module, unless that returns its weights."""
        if self._running and self._running[-1] not in self._returned:
            self.weights.setdefault(self._running[-1], []).append(_average(weights))

    def add_returned(self, key: Any, weights: Tensor) -> None:
        """Note weights that a module returns, once however many modules around it hand them on."""
        if key not in self._returned:
            self._returned.add(key)
            self.weights[key] = []
        found = _average(weights)
        if not any(x.shape == found.shape and torch.equal(x, found) for x in self.weights[key]):
            self.weights[key].append(found)


@contextmanager
def record_attention(watched: Mapping[Any, nn.Module], *, is_square: bool = False) -> Iterator[Recording]:
    """Record the attention that is computed inside of modules.

    Args:
        watched: the modules, by keys of your choice. None of them contains another.
        is_square: whether the modules attend from positions to these same positions, so that other weights are none.
    """
    recording = Recording()
    with ExitStack() as stack:
        for key, module in watched.items():
            enter, leave = _mark(recording, key)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            for inner in module.modules():
                if inner is not module:
                    stack.callback(inner.register_forward_hook(_read_returned(recording, key, is_square)).remove)
        stack.enter_context(_Products(recording))
        yield recording


def _mark(recording: Recording, key: Any) -> tuple[Callable[..., None], Callable[..., None]]:
    def enter(module: nn.Module, args: Any) -> None:
        recording._running.append(key)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recording._running.pop()

    return enter, leave


def _read_returned(recording: Recording, key: Any, is_square: bool) -> Callable[..., None]:
    def read(module: nn.Module, args: Any, output: Any) -> None:
        for x in output if isinstance(output, tuple) else ():
            if _are_weights(x, is_square):
                recording.add_returned(key, x)

    return read


def _are_weights(x: Any, is_square: bool) -> bool:
    """Tell weights float[B, h, T, S] from other things that a module returns: each row is a share of at most 1."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        return False
    if is_square and x.shape[-1] != x.shape[-2]:
        return False
    return bool((x >= 0).all()) and float(x.float().sum(-1).max()) <= 1 + _TOLERANCE


class _Products(TorchFunctionMode):
    """Computes the weights of each `scaled_dot_product_attention` beside its result."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _PRODUCT:
            self.recording.add_product(attention_weights(*args, **kwargs))
        return func(*args, **kwargs)


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights by which `scaled_dot_product_attention` with these arguments would average the values.

    Args:
        query: float[B, h, T, k].
        key: float[B, g, S, k]; with `enable_gqa`, each of the g heads serves h/g neighbouring ones.
        value: unused.
        attn_mask: bool or float, as torch broadcasts it to [B, h, T, S].
        dropout_p: unused.
        is_causal: whether query i sees the keys up to i alone.
        scale: of the products; None for 1/√k.
        enable_gqa: whether there may be fewer heads of keys than of queries.

    Returns:
        float32[B, h, T, S]; each row sums to 1, or to 0 if it sees no key.
    """
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3) if enable_gqa else key
    scores = query.float() @ key.float().transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.float()
    return scores.softmax(-1).nan_to_num(0.0)


def _average(weights: Tensor) -> Tensor:
    return weights.detach().float().mean(-3).cpu()
