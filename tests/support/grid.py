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


def first_of(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Values to parametrize a test with. It runs on the first ones; on the others it has the marker `matrix`."""
    return first_rows(((value,) for value in values), count)


def first_rows(rows: Iterable[tuple[Any, ...]], count: int = 1) -> list[Any]:
    """The same for a test with several arguments: a row holds a value for each."""
    return [pytest.param(*row, marks=() if i < count else pytest.mark.matrix) for i, row in enumerate(rows)]
