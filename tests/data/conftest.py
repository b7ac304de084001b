"""Pictures and records about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import write_pictures_and_records


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and 24 records about them in `train.jsonl`."""
    return write_pictures_and_records(tmp_path_factory.mktemp("data"))
