"""A tiny model of each fusion, built as `vlm build` builds one, and records of plain colours for it to learn."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import vlm_cli
from examples import tiny_language_model
from tests.support.training import CROSS_ATTENTION, LANGUAGE_STREAM, TRAINING_TOWER, write_pictures_and_records
from vlm_cli.checkpoint.saving import save
from vlm_cli.cli.app import app
from vlm_cli.composition import Composition


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tower and a language model as files."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "tower.json").write_text(json.dumps(TRAINING_TOWER))
    tiny_language_model.make(folder / "lm")
    return {"vision_encoder": str(folder / "tower.json"), "language_model": str(folder / "lm")}


@pytest.fixture(scope="session")
def build(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a model of these parts and further settings."""

    def write_model(settings: dict[str, Any], **create: Any) -> Path:
        blueprint = vlm_cli.plan(Composition.compose(None, parts, settings))
        out = tmp_path_factory.mktemp("model") / "vlm"
        out.mkdir()
        save(vlm_cli.create(blueprint, **create), blueprint.processor, out)
        return out

    return write_model


@pytest.fixture(scope="session")
def cross_attention(build: Callable[..., Path]) -> Path:
    return build(CROSS_ATTENTION)


@pytest.fixture(scope="session")
def language_stream(build: Callable[..., Path]) -> Path:
    return build(LANGUAGE_STREAM)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and 24 records about them in `train.jsonl`."""
    return write_pictures_and_records(tmp_path_factory.mktemp("data"))


@pytest.fixture
def vlm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Run a command line in this process."""
    # Transformers and Accelerate write here.
    before = dict(os.environ)
    yield lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
    os.environ.clear()
    os.environ.update(before)
