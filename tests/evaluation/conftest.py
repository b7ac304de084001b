"""A tiny VLM as a directory, pictures, and records about them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.support import ROOT, seed_torch, tiny
from tests.support.command import vlm
from tests.support.questions import COLOURS, Write


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and models `stream` and `attention` whose every part matters."""
    path = tmp_path_factory.mktemp("evaluation")
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGB", (40, 40), "black")
        ImageDraw.Draw(image).ellipse([4 * number, 8, 30, 36], fill=colour)
        image.save(path / f"{colour}.png")
    runpy.run_path(str(ROOT / "examples" / "tiny_language_model.py"))["make"](path / "lm")
    (path / "tower.json").write_text(json.dumps(tiny.VISION["vit"]))
    for name, family in (("stream", "llava"), ("attention", "flamingo")):
        _build(path / name, family, path)
    return path


def _build(out: Path, family: str, folder: Path) -> None:
    from vlm_cli.checkpoint.directory import load
    from vlm_cli.checkpoint.saving import save

    built = out.with_suffix(".built")
    words = ["--family", family, "--vision-encoder", str(folder / "tower.json"), "--language-model", str(folder / "lm")]
    code, printed = vlm(["build", str(built), "--random-weights", *words])
    assert code == 0, printed
    model, processor = load(str(built))
    seed_torch(0)
    tiny.open_gates(model)
    tiny.stir(model.lang_model, 0.3)
    out.mkdir()
    save(model, processor, out)


@pytest.fixture
def write(folder: Path) -> Write:
    """Write records beside the pictures."""

    def write(records: list[Any], name: str = "data.jsonl") -> Path:
        path = folder / name
        lines = [x if isinstance(x, str) else json.dumps(x) for x in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
