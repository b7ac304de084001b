"""Tests that run on every combination of some values, of which only a sample is quick."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import pytest


def grid(**axes: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with every combination of the values of each argument.

    The fast tests run as few combinations as hold each value at least once: the first values of all axes together, the
    second values, and so on, where a shorter axis starts again. The others have the marker `matrix`.
    """
    longest = max(map(len, axes.values()))
    quick = set(itertools.islice(zip(*map(itertools.cycle, axes.values()), strict=False), longest))
    return pytest.mark.parametrize(
        list(axes),
        [
            pytest.param(*values, marks=() if values in quick else pytest.mark.matrix)
            for values in itertools.product(*axes.values())
        ],
    )


def first_of(values: Collection[Any]) -> list[Any]:
    """Values to parametrize a test with. It runs on the first; on the others it has the marker `matrix`."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.matrix) for value in others)]
