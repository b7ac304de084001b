"""The lower bounds of pyproject.toml are the versions that `PIP_CONSTRAINT=constraints/oldest.txt .ci/run` tests."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support import ROOT


def test_lower_bounds_are_the_oldest_tested_versions() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert versions(needed, ">=") == versions([pin for pin in pins if not pin.startswith("#")], "==")


def versions(lines: list[str], operator: str) -> dict[str, Version]:
    """The version that each line names, by package; 5.18 and 5.18.0 are one."""
    found = {}
    for requirement in map(Requirement, lines):
        (bound,) = requirement.specifier
        assert bound.operator == operator, str(requirement)
        found[canonicalize_name(requirement.name)] = Version(bound.version)
    return found
