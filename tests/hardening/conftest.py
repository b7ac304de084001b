"""The files that the attack damages, made once, and the seed of the attack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.hardening.subjects import Workshop


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    from tests.hardening.subjects import make

    return make(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def hardening_seed(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("hardening_seed"))
