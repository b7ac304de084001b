"""A tiny model of each fusion, built as `vlm build` builds one, and records of plain colours for it to learn."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from training_files import COLOURS, CROSS_ATTENTION, LANGUAGE_STREAM, SIZE, TOWER, write
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import tiny_language_model

import vlm_cli
from vlm_cli.checkpoint.directory import save
from vlm_cli.cli.app import app
from vlm_cli.composition import Composition


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tower and a language model as files."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "tower.json").write_text(json.dumps(TOWER))
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
    folder = tmp_path_factory.mktemp("data")
    records: list[dict[str, Any]] = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (SIZE, SIZE), colour).save(folder / f"{name}.png")
        prompt = f"<image:{name}.png>"
        records += [
            {"prompt": f"{prompt}Caption:", "completion": f" A {name} square.", "id": f"caption-{name}"},
            {"prompt": f"{prompt}Q: What colour? A:", "completion": f" {name}"},
            {
                "prompt": prompt,
                "turns": [
                    {"prompt": "Q: What colour? A:", "completion": f" {name}"},
                    {"prompt": " Q: A circle? A:", "completion": " no"},
                ],
            },
        ]
    write(folder / "train.jsonl", [*records, *records])
    return folder


@pytest.fixture
def vlm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Run a command line in this process."""
    # Transformers and Accelerate write here.
    before = dict(os.environ)
    yield lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
    os.environ.clear()
    os.environ.update(before)
