"""How many floating-point operations a run computes, and what share that is of what its device can.

The first pass of a run is counted as it runs, and so is the first with pictures. Later ones are estimated from it:

    pictures   the share of vision encoder and vision tokenizer, for each picture or frame
    positions  everything else, for each token and for each position that a picture takes in the language model

Padding is in what is counted, and not in what is estimated: a device that computes on padding is no better used. That
attention grows with the square of a text's length is left out of the estimate. As in
`FlopCount`, products count, and what works on single numbers does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm_cli.costs.cards import find_device, measure_peak
from vlm_cli.costs.flops import FlopCount
from vlm_cli.errors import first_line
from vlm_cli.modeling.vlm import VLM
from vlm_cli.report.tables import human_flops
from vlm_cli.tiling import MediumSize

__all__ = ["CountedPass", "Operations", "find_peak"]


@dataclass(frozen=True)
class CountedPass:
    """One forward and backward pass.

    Attributes:
        flops: operations of both, what gradient checkpointing computes twice included.
        vision: those of them in the vision encoder and the vision tokenizer.
        tokens: that the pass read, padding included.
        images: that it read, frames and tiles included.
    """

    flops: int
    vision: int
    tokens: int
    images: int


class Operations:
    """Counts the first passes of a run, and estimates the others.

    Args:
        model: that trains.
        peak: operations per second that the devices of the run can compute; None if nobody knows.
        problem: why nothing can be counted; None if it can.

    Attributes:
        first: the pass from which others are estimated; None before it.
    """

    def __init__(self, model: VLM, peak: float | None, problem: str | None = None) -> None:
        self.model, self.peak, self.problem = model, peak, problem
        self.first: CountedPass | None = None
        self._positions = model.positions_of(MediumSize(1)) - 1  # of a picture, beyond its token
        self._counted: set[bool] = set()

    @contextmanager
    def counting(self, tokens: int, images: int) -> Iterator[None]:
        """Count the pass in the block, if it is the first, or the first with pictures.

        Args:
            tokens: that it reads, padding included.
            images: that it reads.
        """
        if self.problem is not None or bool(images) in self._counted:
            yield
            return
        parts = (self.model.vision_encoder, self.model.vision_tokenizer)
        with _TrainingCount() as count, count.within(parts[0]) as encoder, count.within(parts[1]) as tokenizer:
            yield
        self.problem = count.problem
        if self.problem is not None:
            self.first = None
            return
        self._counted |= {bool(images), False}  # text alone is estimated from a pass with pictures, too
        shares = (sum(calls) * _passes(part) for part, calls in zip(parts, (encoder, tokenizer), strict=True))
        self.first = CountedPass(count.total, min(sum(shares), count.total), tokens, images)

    def estimate(self, tokens: int, images: int) -> float | None:
        """Estimate the operations of passes over so many tokens and images; None if nothing was counted."""
        if self.first is None:
            return None
        first = self.first
        each = (first.flops - first.vision) / (first.tokens + first.images * self._positions)
        picture = first.vision / max(first.images, 1)
        return each * (tokens + images * self._positions) + picture * images

    def describe(self, flops_per_step: float) -> str:
        """Say what a step computes, and what the devices of the run can."""
        can = "" if self.peak is None else f" The run's devices can compute {human_flops(self.peak)}FLOP a second."
        return f"A step computes about {human_flops(flops_per_step)}FLOP, estimated from the first.{can}"

    def measure(self, tokens: int, images: int, *, steps: int, seconds: float) -> dict[str, float]:
        """Return what the log tells of steps: operations of each, their number per second, and the device's used share.

        Args:
            tokens: that the steps read, without padding.
            images: that they read.
            steps: their number.
            seconds: in which they were done.
        """
        found = self.estimate(tokens, images)
        if found is None:
            return {}
        rate = found / seconds
        told: dict[str, float] = {"flops_per_step": round(found / max(steps, 1)), "flops_per_second": round(rate)}
        return told if self.peak is None else told | {"utilisation": round(rate / self.peak, 4)}


def find_peak(device: torch.device, *, bf16: bool, processes: int) -> float | None:
    """Return the operations per second of all devices of a run; None if nobody knows.

    That of a CPU is measured with one product of matrices, that of a GPU is its maker's number.

    Args:
        device: of this process.
        bf16: products are computed in bfloat16.
        processes: number of devices.
    """
    dtype = "bfloat16" if bf16 else "float32"
    if device.type == "cpu":
        return measure_peak(dtype) if processes == 1 else None  # processes share one CPU's cores, or not
    uses_tf32 = not bf16 and torch.get_float32_matmul_precision() != "highest"
    card = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" and not uses_tf32 else None
    return None if card is None else processes * card.peak[dtype]


class _TrainingCount(FlopCount):
    """Counts without ending a run where a formula does not know what another package calls.

    Attributes:
        problem: why the count is not whole; None if it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problem: str | None = None

    def count(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> int:
        try:
            return super().count(func, args, kwargs, found)
        except Exception as error:  # a formula is written for the calls that its author knew
            self.problem = f"those of {func} are unknown ({first_line(error)})"
            return 0

    @contextmanager
    def within(self, part: nn.Module) -> Iterator[list[int]]:
        """Count the operations of each call of a part in the block."""
        begun: list[int] = []
        calls: list[int] = []
        hooks = [
            part.register_forward_pre_hook(lambda module, args: begun.append(self.total)),
            part.register_forward_hook(lambda module, args, output: calls.append(self.total - begun.pop())),
        ]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()


def _passes(part: nn.Module) -> int:
    """Say how often a part's products are computed in a pass: a trained one has two for each in its backward pass."""
    return 3 if any(p.requires_grad for p in part.parameters()) else 1
