"""The marker `sample`, which chooses what the fast tests run."""

from __future__ import annotations

import pytest

from tests.support.grid import leave_to_long_tests

pytest_plugins = "pytester"

CASES = """
import pytest

@pytest.mark.sample(3)
@pytest.mark.parametrize("x", [0, 1, 2, pytest.param(3, marks=pytest.mark.matrix), 4, 5, 6, 7, 8, 9])
def test_many(x): ...

@pytest.mark.sample(3)
@pytest.mark.parametrize("x", [0, 1])
def test_two(x): ...

@pytest.mark.parametrize("x", range(4))
def test_unmarked(x): ...
"""


def test_a_sample_is_spread_from_the_first_case_to_the_last(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    matrix\n    sample")
    items = pytester.getitems(CASES)
    leave_to_long_tests(items)
    fast = {item.name for item in items if not item.get_closest_marker("matrix")}
    unmarked = {f"test_unmarked[{x}]" for x in range(4)}
    assert fast == {"test_many[0]", "test_many[5]", "test_many[9]", "test_two[0]", "test_two[1]"} | unmarked
