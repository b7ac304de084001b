"""Bins: every value is in exactly one, and their borders are round."""

from __future__ import annotations

from random import Random

import pytest

from vlm_cli.data.histogram import Bin, Distribution


@pytest.mark.parametrize("seed", range(40))
def test_every_value_is_in_one_bin(seed: int) -> None:
    random = Random(seed)
    values = [int(random.expovariate(1 / random.choice((1, 30, 4_000)))) for _ in range(random.randint(1, 300))]
    bins = Distribution(values).bins()
    assert len(bins) <= 13
    for found in bins:
        assert found.count == sum(found.low <= x and (found.high is None or x <= found.high) for x in values)
    assert sum(found.count for found in bins) == len(values)
    assert [a.high for a in bins[:-1]] == [b.low - 1 for b in bins[1:]]
    steps = {found.high - found.low + 1 for found in bins if found.high is not None}
    assert len(steps) == 1 and str(steps.pop()).rstrip("0") in ("1", "2", "5")


def test_what_lies_far_above_does_not_stretch_the_bins() -> None:
    *_, last = Distribution([*range(100), *range(100), 10_000]).bins()
    assert last.high is None and last.count == 1 and last.low <= 120
    assert (last.label, Bin(20, 39, 1).label, Bin(7, 7, 1).label) == (f"{last.low:,}+", "20-39", "7")


def test_quantiles_are_values() -> None:
    found = Distribution([5, 1, 3, 2, 4]).to_dict()
    assert (found["least"], found["median"], found["mean"], found["p95"], found["most"]) == (1, 3, 3.0, 5, 5)
