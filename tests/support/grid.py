"""Tests that run on every combination of some values, of which only a sample is quick."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def grid(*, quick: Mapping[str, Collection[Any]] | None = None, **axes: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with every combination of the values of each argument.

    The fast tests run as few combinations as hold each value at least once: the first values of all axes together, the
    second values, and so on, where a shorter axis starts again. The others have the marker `matrix`.

    Args:
        quick: for some axes, the values among which the fast tests choose.
        axes: the values of each argument.
    """
    among = [(quick or {}).get(name, values) for name, values in axes.items()]
    longest = max(map(len, among))
    chosen = set(itertools.islice(zip(*map(itertools.cycle, among), strict=False), longest))
    return pytest.mark.parametrize(
        list(axes),
        [
            pytest.param(*values, marks=() if values in chosen else pytest.mark.matrix)
            for values in itertools.product(*axes.values())
        ],
    )


def leave_to_long_tests(items: Iterable[pytest.Item]) -> None:
    """Give the marker `matrix` to cases of a test that its marker `sample(N)` does not choose.

    The fast tests run N cases of such a test, spread evenly from the first to the last.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        is_long = item.get_closest_marker("matrix") or item.get_closest_marker("attack")
        if item.get_closest_marker("sample") and not is_long:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in cases.values():
        marker = group[0].get_closest_marker("sample")
        assert marker is not None
        [count] = marker.args
        chosen = {round(i * (len(group) - 1) / max(count - 1, 1)) for i in range(count)}
        for i, item in enumerate(group):
            if i not in chosen:
                item.add_marker(pytest.mark.matrix)


def first_of(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Values to parametrize a test with. It runs on the first ones; on the others it has the marker `matrix`."""
    return first_rows(((value,) for value in values), count)


def first_rows(rows: Iterable[tuple[Any, ...]], count: int = 1) -> list[Any]:
    """The same for a test with several arguments: a row holds a value for each."""
    return [pytest.param(*row, marks=() if i < count else pytest.mark.matrix) for i, row in enumerate(rows)]
