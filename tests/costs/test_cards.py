"""The roofline: what decides a time, and the measured times that it was compared with."""

from __future__ import annotations

import pytest

from vlm_cli.costs.cards import CARDS, Card, find_card, measure_cpu
from vlm_cli.costs.crossings import crossings
from vlm_cli.costs.flops import Work
from vlm_cli.errors import UnknownNameError

CARD = Card(name="x", memory=None, peak={"float32": 100.0}, bandwidth=10.0, share=0.5, moved=1.0,
            moved_by_products=0.5, host=2.0)  # fmt: skip


@pytest.mark.parametrize(
    ("works", "seconds"),
    [
        ([Work(500, 5)], 10.0),  # the product decides
        ([Work(50, 50)], 10.0),  # the bytes of a product do
        ([Work(0, 50)], 5.0),  # those of a stream
        ([Work(0, 0)] * 3, 6.0),  # the host
        ([Work(500, 5), Work(0, 50)], 15.0),
    ],
)
def test_the_slowest_decides(works: list[Work], seconds: float) -> None:
    assert CARD.seconds(works, "float32") == seconds


def test_a_cpu_adds_up_what_others_do_at_once() -> None:
    from dataclasses import replace

    assert replace(CARD, overlaps=False).seconds([Work(500, 5)], "float32") == 11.0


@pytest.mark.matrix
def test_this_machine_is_measured() -> None:
    card = find_card("cpu")
    assert 1e8 < card.peak["float32"] < 1e15 and 1e8 < card.bandwidth < 1e13
    assert not measure_cpu(("float32", "bfloat16")).overlaps
    with pytest.raises(UnknownNameError, match="Known: h100, a100, 4090, l4, cpu"):
        find_card("h")
    assert set(CARDS) == {"h100", "a100", "4090", "l4"}


def test_crossings_are_those_of_a_search_through_all() -> None:
    def first(n: int) -> float:
        return 1000 + 2 * n + n * n / 500

    def second(n: int) -> float:
        return 100 + 3 * n + n * n / 400

    lowest = [second(n) < first(n) for n in range(1, 5001)]
    wanted = [(1, lowest[0])] + [(n + 1, lowest[n]) for n in range(1, 5000) if lowest[n] != lowest[n - 1]]
    assert crossings(first, second, 5000) == wanted and len(wanted) == 2
    assert crossings(first, first, 5000) == [(1, False)]
