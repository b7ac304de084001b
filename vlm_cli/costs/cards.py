"""Estimated seconds on a card: a roofline over the operations of torch.

    operation   max(floating-point operations / (share · peak), bytes / (moved · bandwidth))
    run         max(sum over its operations, number of operations · host)

`peak` and `bandwidth` are the maker's numbers. `share` is what large products reach of the peak, `moved` what streams
of numbers reach of the bandwidth, and `host` the seconds in which Python and torch start one operation of an eager
model. The last term decides where a model is small for its card, as in decoding. A CPU does not read ahead while it
computes: there the two times of an operation add up.

`share`, `moved` and `host` of the H100 come from measurements with this package: 32 images through ViT-L-14 in 12.6 ms,
a copy at 3.0 TB/s, and a decoded token of LLaMA with 1.24 B parameters in 12.2 ms, bfloat16, eager. The other cards
have their makers' numbers and the shares of the H100: nobody has measured them here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from vlm_cli.costs.flops import Work
from vlm_cli.errors import UnknownNameError
from vlm_cli.printable import count_of
from vlm_cli.registry import suggest

__all__ = ["CARDS", "Card", "find_card", "find_device", "measure_cpu", "measure_peak"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """The limits of a device.

    Attributes:
        name: of the card.
        memory: bytes; None for that of the machine.
        peak: dtype -> floating-point operations per second, without sparsity.
        bandwidth: bytes per second that the memory moves.
        share: of `peak` that large products reach.
        moved: of `bandwidth` that an operation on single numbers reaches.
        moved_by_products: of `bandwidth` that a product reaches, where bytes decide its time.
        host: seconds to start an operation.
        overlaps: it computes while it reads; otherwise the two times add up.
        source: where the numbers come from.
    """

    name: str
    memory: int | None
    peak: Mapping[str, float]
    bandwidth: float
    share: float = 0.6
    moved: float = 0.9
    moved_by_products: float = 0.9
    host: float = 21e-6
    overlaps: bool = True
    source: str = "the maker's data sheet, and shares measured on an H100"

    def seconds(self, works: Iterable[Work], dtype: str) -> float:
        """Estimate how long operations take.

        Args:
            works: what `FlopCount` noted.
            dtype: of the products.
        """
        works = list(works)
        rate = self.peak[dtype] * self.share
        streams, products = self.bandwidth * self.moved, self.bandwidth * self.moved_by_products
        join = max if self.overlaps else sum
        device = sum(join((w.flops / rate, w.bytes / (products if w.flops else streams))) for w in works)
        return max(device, len(works) * self.host)


def _half_and_full(half: float, full: float) -> dict[str, float]:
    return {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": full * 1e12}


#: Name -> card. float32 without TensorFloat-32, as torch computes by default.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(name="h100", memory=80 * 10**9, peak=_half_and_full(989, 67), bandwidth=3.35e12),  # SXM
        Card(name="a100", memory=80 * 10**9, peak=_half_and_full(312, 19.5), bandwidth=2.04e12),  # SXM, 80 GB
        Card(name="4090", memory=24 * 10**9, peak=_half_and_full(165, 82.6), bandwidth=1.01e12),
        Card(name="l4", memory=24 * 10**9, peak=_half_and_full(121, 30.3), bandwidth=0.3e12),
    )
}


#: What torch calls a device -> the name of its card. Others of the same family have other limits.
_DEVICES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA GeForce RTX 4090": "4090",
    "NVIDIA L4": "l4",
}


def find_device(name: str) -> Card | None:
    """Return the card of a device, by the name that torch has for it; None if it is not in the table."""
    return CARDS[_DEVICES[name]] if name in _DEVICES else None


def find_card(name: str) -> Card:
    """Return a card by its name; `cpu` is this machine's, measured now.

    Raises:
        UnknownNameError: naming those there are.
    """
    if name == "cpu":
        return measure_cpu()
    if name not in CARDS:
        known = [*CARDS, "cpu"]
        raise UnknownNameError(f"unknown card {name!r}.{suggest(name, known)} Known: {', '.join(known)}.")
    return CARDS[name]


def measure_cpu(dtypes: Iterable[str] = ("float32", "bfloat16")) -> Card:
    """Measure this machine's limits in about a second: a product, a matrix with one vector, and a copy."""
    peak = {name: measure_peak(name) for name in dtypes}
    peak["float16"] = peak["bfloat16"]
    large = torch.ones(8192, 4096)  # 134 MB, beyond any cache
    copied = 2 * large.nbytes / _time(large.clone)
    vector = torch.ones(4096)
    multiplied = large.nbytes / _time(lambda: large @ vector)
    one = torch.ones(1)
    return Card(
        name="cpu",
        memory=None,
        peak=peak,
        bandwidth=copied,
        share=1.0,
        moved=1.0,
        moved_by_products=min(1.0, multiplied / copied),
        host=_time(lambda: one + one),
        overlaps=False,
        source=f"measured now, with {count_of(torch.get_num_threads(), 'thread')}",
    )


def measure_peak(dtype: str, runs: int = 3) -> float:
    """Return the floating-point operations per second of this machine's CPU in a product of large matrices."""
    x = torch.ones(1024, 1024, dtype=getattr(torch, dtype))
    return 2 * 1024**3 / _time(lambda: x @ x, runs)


def _time(work: Callable[[], object], runs: int = 5) -> float:
    """Return the seconds of the fastest of several runs."""
    work()
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)
