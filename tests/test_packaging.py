"""What an installed package holds: every file of the checkout that is not Python is among its data."""

from __future__ import annotations

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "vlm_cli"
LEFT_OUT = ("__pycache__",)


def unpacked(patterns: list[str]) -> list[str]:
    """The data files of the package that no pattern names."""
    named = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".py")
    return [str(path.relative_to(PACKAGE)) for path in files if path not in named and path.parent.name not in LEFT_OUT]


def test_every_data_file_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["vlm_cli"]
    assert unpacked(patterns) == []
    assert "report/run_page.css" in unpacked(["demo/*", "report/*.json"])
