"""Find out what a vision model's tokens are, by running the model on the meta device, where nothing is computed.

A vision transformer of 224 pixels with patches of 16 pixels, a class token and four registers has 201 tokens:

    class  r r r r  p p p p p p …        1 + 4 + 14·14

N images, T tokens, d channels, h w rows and columns of patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlm_cli.errors import VisionEncoderError

__all__ = ["Stop", "Structure", "first_tensor", "infer_grid", "read_structure", "stop_at"]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What the output of a vision model consists of.

    Attributes:
        grid: (rows, columns) of the patches of the last layer.
        before: tokens before the patches.
        after: tokens after the patches.
        has_class_token: whether the first token is a class token.
        layers: name of the list of layers; None if the layers cannot be told apart.
        depth: number of the layers.
        norm: name of the norm after the last layer; None if there is none that fits patches.
        is_normed: whether the model's own output has passed this norm.
        is_map: whether the output is a map, float[N, d, h, w], and not tokens.
        channels_last: whether a map is float[N, h, w, d].
        is_single_stack: whether all layers have this grid.
    """

    grid: tuple[int, int]
    before: int = 0
    after: int = 0
    has_class_token: bool = False
    layers: str | None = None
    depth: int = 0
    norm: str | None = None
    is_normed: bool = False
    is_map: bool = False
    channels_last: bool = False
    is_single_stack: bool = False


class Stop(Exception):
    """Ends a forward pass early."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


@contextmanager
def stop_at(module: nn.Module, *, before: bool = False) -> Iterator[None]:
    """End a forward pass at a module with `Stop`, which holds the module's output, or its input if `before`."""

    def enough(value: Any) -> None:
        raise Stop(first_tensor(value))

    if before:
        handle = module.register_forward_pre_hook(
            lambda _, args, named: enough((*args, *named.values())), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(lambda _, args, output: enough(output))
    try:
        yield
    finally:
        handle.remove()


def first_tensor(value: Any) -> Tensor:
    """Return the first tensor in what a module takes or gives.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(value, Tensor):
        return value
    for x in value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ():
        if isinstance(x, (Tensor, tuple, list, dict)):
            return first_tensor(x)
    raise ValueError("a layer of the model gives no tensor")


@dataclass(frozen=True)
class _Call:
    """One call of a module during a forward pass."""

    name: str
    module: nn.Module
    given: tuple[int, ...]
    output: Any


def read_structure(model: nn.Module, run: Callable[[], Tensor], size: tuple[int, int]) -> Structure:
    """Find the structure of a model's output.

    Args:
        model: on the meta device.
        run: runs the model on one image, and returns its last features.
        size: (H, W) pixels of the image.

    Raises:
        VisionEncoderError: if the output is neither a map nor tokens of patches, or its tokens cannot be told apart.
    """
    calls, output = _record(model, run)
    layers = _find_layers(model, calls)
    depth = 0 if layers is None else len(model.get_submodule(layers))  # type: ignore[arg-type]
    norm, is_normed = _find_norm(calls, layers, output)
    facts: dict[str, Any] = {"layers": layers, "depth": depth, "norm": norm, "is_normed": is_normed}
    if output.ndim == 4:
        first, last = output.shape[2:], output.shape[1:3]
        channels_last = _misfit(first, size) > _misfit(last, size)
        grid = last if channels_last else first
        return Structure(grid=(grid[0], grid[1]), is_map=True, channels_last=channels_last, **facts)
    if output.ndim != 3 or output.shape[0] != 1:
        raise VisionEncoderError(
            f"its output has the shape {tuple(output.shape)}, and vlm reads (1, T, d) or (1, d, h, w)"
        )
    return _read_tokens(model, calls, output.shape[1], size, facts)


def _record(model: nn.Module, run: Callable[[], Tensor]) -> tuple[list[_Call], Tensor]:
    """Run a model, and return the calls of its modules in the order of their ends, and its output."""
    calls: list[_Call] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = next((tuple(x.shape) for x in args if isinstance(x, Tensor)), ())
            calls.append(_Call(name, module, given, output))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        return calls, run()
    finally:
        for handle in handles:
            handle.remove()


def _find_layers(model: nn.Module, calls: list[_Call]) -> str | None:
    """Return the name of the list of layers: the heaviest list whose items ran once each, in order."""
    order = {call.name: i for i, call in enumerate(calls)}
    counts: dict[str, int] = {}
    for call in calls:
        counts[call.name] = counts.get(call.name, 0) + 1
    best, weight = None, 0
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            continue
        items = [f"{name}.{key}" for key, _ in module.named_children()]
        if any(counts.get(item) != 1 for item in items) or sorted(items, key=order.__getitem__) != items:
            continue
        size = sum(p.numel() for p in module.parameters())
        if size > weight:
            best, weight = name, size
    return best


def _find_norm(calls: list[_Call], layers: str | None, output: Tensor) -> tuple[str | None, bool]:
    """Return the name of the norm after the last layer, and whether the output has passed it.

    A norm that only the class token passes, as CLIP's, fits patches too. One in a pooler does not: it was trained on
    the mean.
    """
    if layers is None:
        return None, False
    ended = max(i for i, call in enumerate(calls) if call.name.startswith(f"{layers}."))
    for call in calls[ended + 1 :]:
        if "norm" not in type(call.module).__name__.lower() or not list(call.module.parameters(recurse=False)):
            continue
        if re.search(r"pool|head|neck|fpn", call.name):
            continue
        if call.output is output:
            return call.name, True
        if (
            output.ndim == 3
            and call.given[:1] == output.shape[:1]
            and call.given[-1:] == output.shape[-1:]
            and math.prod(call.given[1:-1]) == 1
        ):
            return call.name, False
    return None, False


#: Names of parameters that become tokens of their own -> whether such a token stands after the patches.
_TOKENS = re.compile(
    r"(^|_)(cls|class|dist\w*|register|reg|detection|det|summary|prefix)(_\w+)*_(tokens?|embedding)$|^class_embedding$"
)
_CLASS = re.compile(r"(^|_)(cls|class)")


def _read_tokens(
    model: nn.Module, calls: list[_Call], total: int, size: tuple[int, int], facts: dict[str, Any]
) -> Structure:
    """Tell patches from the tokens beside them."""
    width = None
    own: list[tuple[str, int]] = []
    for name, p in model.named_parameters():
        last = name.rpartition(".")[2]
        if _TOKENS.search(last) and not name.startswith(("head.", "pooler.")):
            width = p.shape[-1]
            own.append((last, p.numel() // width))
    beside = sum(count for _, count in own)
    first = _first_grid(calls)
    grid = None if first is None else _shrink(first, total - beside)
    if grid is None and (grid := infer_grid(total - beside, size)) is None:
        raise VisionEncoderError(
            f"it gives {total} tokens of which {beside} are class and register tokens, and the others form no grid "
            f"for images of {size[0]} x {size[1]} pixels"
        )
    more = total - grid[0] * grid[1]
    if more != beside:
        names = ", ".join(f"{name} ({count})" for name, count in own) or "none"
        raise VisionEncoderError(
            f"it gives {total} tokens for a grid of {grid[0]} x {grid[1]} patches, and its class and register tokens "
            f"are {names}, so that {abs(more - beside)} tokens cannot be explained"
        )
    after = sum(count for name, count in own if name.startswith("det"))
    has_class = any(_CLASS.search(name) for name, _ in own)
    return Structure(
        grid=grid,
        before=beside - after,
        after=after,
        has_class_token=has_class,
        is_single_stack=first in (None, grid),
        **facts,
    )


def _first_grid(calls: list[_Call]) -> tuple[int, int] | None:
    """Return the (rows, columns) that the first convolution makes of an image; None without one."""
    first = next((x for x in calls if isinstance(x.module, nn.Conv2d) and x.module.in_channels == 3), None)
    return None if first is None else (first.output.shape[-2], first.output.shape[-1])


def _shrink(grid: tuple[int, int], count: int) -> tuple[int, int] | None:
    """Return a grid, or the first of those half, a quarter, … as large that has no more patches than `count`."""
    rows, columns = grid
    while rows * columns > count:
        rows, columns = rows // 2, columns // 2
    return (rows, columns) if rows * columns else None


def _misfit(grid: Any, size: tuple[int, int]) -> float:
    """Say how far a grid is from the shape of an image."""
    return abs(math.log(grid[0] / grid[1]) - math.log(size[0] / size[1]))


def infer_grid(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the (rows, columns) of `count` patches that fit the shape of an image best; None if no grid fits.

    >>> infer_grid(196, (224, 224)), infer_grid(128, (256, 128)), infer_grid(13, (224, 224))
    ((14, 14), (16, 8), None)
    """
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    best = min(pairs, key=lambda pair: _misfit(pair, size), default=None)
    return best if best is not None and _misfit(best, size) < math.log(1.5) else None
