"""A base composition of tiny parts on disk, and the folder in which sweeps run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from examples import tiny_language_model
from tests.support.training import LANGUAGE_STREAM, TRAINING_TOWER, write_pictures_and_records


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base.yaml`, its parts, pictures, and records about them in `train.jsonl`."""
    folder = write_pictures_and_records(tmp_path_factory.mktemp("sweep"))
    (folder / "tower.json").write_text(json.dumps(TRAINING_TOWER))
    tiny_language_model.make(folder / "lm")
    parts = {"vision_encoder": "tower.json", "language_model": "lm"}
    (folder / "base.yaml").write_text(yaml.safe_dump({**parts, **LANGUAGE_STREAM}))
    return folder


@pytest.fixture
def here(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prepared folder, as the working directory."""
    monkeypatch.chdir(prepared)
    return prepared
