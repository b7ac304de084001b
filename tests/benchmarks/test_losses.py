"""Runs that compute the same in another way have the losses of a plain run, and their twins have not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import losses
from benchmarks.processes import PAGE
from tests.support.markdown import table


def test_the_page_shows_each_comparison() -> None:
    rows = table(PAGE.read_text(encoding="utf-8"), "compared with a plain run")
    assert [row[0] for row in rows] == [case.name for case in losses.CASES]
    for _, *right, _, first, second in rows:
        assert all(float(x) < 1e-5 for x in right) and min(float(first), float(second)) > 1e-3


@pytest.mark.matrix
def test_the_losses(tmp_path: Path) -> None:
    found = losses.compare(tmp_path)
    assert list(found) == [case.name for case in losses.CASES]
    for name, fusions in found.items():
        assert list(fusions) == list(losses.FUSIONS)
        assert all(right < 1e-5 and wrong > 1e-3 for right, wrong in fusions.values()), (name, fusions)
