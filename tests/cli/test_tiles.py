"""Commands with a model that cuts pictures into tiles: a tiny SmolVLM of Transformers, imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.published.layouts.test_idefics3 import make
from tests.support import ROOT
from vlm_cli.models import DEMO

CAT = ROOT / "examples" / "images" / "cat.jpg"  # 400x266
PROMPT = f"<image:{CAT}>w5 w6"


@pytest.fixture(scope="module")
def model(vlm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smolvlm")
    make(folder / "published", "smolvlm")
    assert vlm("build", folder / "ours", "--from", folder / "published").exit_code == 0
    return folder / "ours"


def positions(result: Any) -> int:
    assert result.exit_code == 0, result.stderr
    return int(json.loads(result.stdout)["positions"])


def test_a_picture_takes_the_positions_of_its_tiles(vlm: Callable[..., Any], model: Path) -> None:
    whole = vlm("generate", "--model", model, "--dry-run", "--json", PROMPT)
    assert f"Image {CAT} (400x266 → 3x2 tiles of 32x32, and the whole image)" in whole.stderr
    # A tile has its fence, its name and 4 vision tokens; the whole picture a fence more. Rows end with a line feed.
    assert positions(whole) == 6 * 6 + 1 + 8 + 2
    fewer = vlm("generate", "--model", model, "--dry-run", "--json", "--max-tiles", 4, PROMPT)
    assert positions(fewer) == positions(vlm("inspect", model, "--max-tiles", 4, "--json", "--prompt", PROMPT)) < 47
    assert "400x266 → 2x2 tiles" in fewer.stderr


def test_what_max_tiles_cannot_do(vlm: Callable[..., Any], model: Path) -> None:
    for words in (["generate", "--model", DEMO.name, PROMPT], ["inspect", DEMO.name, "--prompt", PROMPT]):
        refused = vlm(*words, "--max-tiles", 2)
        assert refused.exit_code == 2 and "its tiling is none" in refused.stderr
    refused = vlm("inspect", model, "--max-tiles", 2)
    assert refused.exit_code == 2 and "--max-tiles needs --prompt" in refused.stderr


@pytest.mark.matrix
def test_every_command_cuts_as_many(vlm: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    one = ["--max-tiles", 4, "--max-new-tokens", 4]
    answer = vlm("generate", "--model", model, "--json", *one, PROMPT)
    text = json.loads(answer.stdout)["text"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT, "completion": text}) + "\n", encoding="utf-8")
    batch = vlm("batch", rows, "--model", model, "--output", tmp_path / "out.jsonl", *one)
    assert batch.exit_code == 0, batch.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["text"] == text
    scores = vlm("eval", model, "--data", rows, "--json", *one)
    assert scores.exit_code == 0, scores.stderr
    found = json.loads(scores.stdout)
    assert (found["total"]["exact"], found["max_tiles"]) == (1, 4)
    others = vlm("generate", "--model", model, "--json", "--max-new-tokens", 4, PROMPT)
    assert json.loads(others.stdout)["prompt_positions"] > json.loads(answer.stdout)["prompt_positions"]
