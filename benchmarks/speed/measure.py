"""Costs of several things that run in turns, and what the machine itself can do."""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

__all__ = [
    "Outcome",
    "Pairs",
    "Run",
    "Skipped",
    "Subject",
    "alternate",
    "compare",
    "exponent",
    "gemm",
    "large_read",
    "limits",
    "matrices",
    "now",
    "process",
    "read_matrices",
    "seconds",
]

#: One run, which returns what it cost: seconds, or bytes.
Run = Callable[[], float]


class Skipped(Exception):
    """Why something is not measured here; stands in its row."""


@dataclass(frozen=True)
class Subject:
    """Something to measure.

    Attributes:
        name: as in the table.
        prepare: makes it; it is in memory as long as the run that this returns. May raise `Skipped`.
    """

    name: str
    prepare: Callable[[], Run]


@dataclass(frozen=True)
class Pairs:
    """Costs of two subjects, of which each pair ran one right after the other."""

    ours: Sequence[float]
    peer: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """Our cost over the peer's, pair by pair: below 1 is ahead."""
        return [a / b for a, b in zip(self.ours, self.peer, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the ratios.

        >>> Pairs([1, 2, 3, 4, 5], [1, 1, 1, 1, 1]).spread
        (2.0, 4.0)
        """
        if len(self.ratios) < 2:
            return self.ratio, self.ratio
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high


Outcome = Pairs | Skipped


def now() -> float:
    """Seconds of a clock, once a GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], Any]) -> Run:
    """A run that costs the time of one call, and of what it left to a GPU."""

    def run() -> float:
        started = now()
        function()
        return now() - started

    return run


def process(*arguments: str) -> Run:
    """A run that costs the time of a whole process of this interpreter, from its start to its end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run() -> float:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        spent = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"{arguments}: {done.stderr[-2000:]}")
        return spent

    return run


def alternate(runs: Mapping[str, Run], rounds: int, *, warm_up: bool = True) -> dict[str, list[float]]:
    """Costs of each, round by round; every second round goes the other way.

    Args:
        runs: by name.
        rounds: how often each runs.
        warm_up: whether each runs once before.
    """
    if warm_up:
        for run in runs.values():
            run()
    costs: dict[str, list[float]] = {name: [] for name in runs}
    with _collecting_by_hand():
        for number in range(rounds):
            for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
                gc.collect()
                costs[name].append(runs[name]())
    return costs


@contextmanager
def _collecting_by_hand() -> Iterator[None]:
    """No garbage is collected but on request, and what is there already is not looked at."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def compare(
    ours: Subject, peers: Sequence[Subject], rounds: int, *, together: bool = True, warm_up: bool = True
) -> dict[str, Outcome]:
    """A subject against each of its peers.

    Args:
        ours: the subject.
        peers: what it is compared with.
        rounds: pairs of each comparison.
        together: keep all peers in memory, so that a round runs each once and ours once; else one at a time.
        warm_up: whether each runs once before.

    Returns:
        By the peers' names, in their order.
    """
    found: dict[str, Outcome] = {}
    run = ours.prepare()
    ready: dict[str, Run] = {}
    for peer in peers:
        try:
            ready[peer.name] = peer.prepare()
            if not together:
                found[peer.name] = _pairs(run, {peer.name: ready.pop(peer.name)}, rounds, warm_up)[peer.name]
        except Skipped as reason:
            found[peer.name] = reason
    if ready:
        found |= _pairs(run, ready, rounds, warm_up)
    return {peer.name: found[peer.name] for peer in peers}


def _pairs(ours: Run, peers: Mapping[str, Run], rounds: int, warm_up: bool) -> dict[str, Pairs]:
    costs = alternate({"": ours, **peers}, rounds, warm_up=warm_up)
    return {name: Pairs(costs[""], costs[name]) for name in peers}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """p of `cost = c·sizeᵖ`, by least squares over the logarithms.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    x, y = (torch.tensor(list(values), dtype=torch.float64).log() for values in (sizes, costs))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


# -- limits of the machine -------------------------------------------------------------------------------------------


def matrices(model: nn.Module) -> list[Tensor]:
    """The matrices that a token passes through, the head's among them: the traffic of one decoded token."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def read_matrices(weights: Sequence[Tensor]) -> Run:
    """Multiply each matrix with one vector, as decoding does, and nothing else."""
    vectors = [torch.randn(1, 1, w.shape[1]).to(w) for w in weights]

    def multiply() -> None:
        for w, x in zip(weights, vectors, strict=True):
            nnf.linear(x, w)

    return seconds(multiply)


def large_read(num_bytes: int, device: str = "cpu") -> Run:
    """Read so many bytes of memory that lie in one piece."""
    memory = torch.ones(num_bytes // 4, device=device)
    return seconds(memory.sum)


def gemm(size: int = 1024, dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Operations per second of a product of two square matrices, the best of five."""
    a = torch.randn(size, size).to(device, dtype)
    times = alternate({"": seconds(lambda: a @ a)}, 5)[""]
    return 2 * size**3 / min(times)


def limits(device: str, dtype: torch.dtype) -> str:
    """What the machine itself can do, for the page: a large product and a large read."""
    size, num_bytes = (1024, 1 << 28) if device == "cpu" else (8192, 1 << 32)
    traffic = num_bytes / min(alternate({"": large_read(num_bytes, device)}, 5)[""])
    speed = gemm(size, dtype, device)
    return (
        f"{speed / 1e9:,.0f} GFLOP/s of a {size} × {size} product in {str(dtype).removeprefix('torch.')}, "
        f"{traffic / 1e9:,.0f} GB/s of a read of {num_bytes / 1e9:.1f} GB"
    )
