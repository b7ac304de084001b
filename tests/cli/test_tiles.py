"""Commands with a model that cuts pictures into tiles: a tiny SmolVLM of Transformers, imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ROOT
from tests.support.idefics3 import make
from vlm_cli import load
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.modeling.learned import row_losses
from vlm_cli.models import DEMO
from vlm_cli.training.dataset import Collator, load_dataset
from vlm_cli.training.packing import join_items

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
    assert (found["total"]["scores"]["exact"]["right"], found["max_tiles"]) == (1, 4)
    others = vlm("generate", "--model", model, "--json", "--max-new-tokens", 4, PROMPT)
    assert json.loads(others.stdout)["prompt_positions"] > json.loads(answer.stdout)["prompt_positions"]


ROCKET, COFFEE = (ROOT / "examples" / "images" / f"{name}.jpg" for name in ("rocket", "coffee"))
ROWS = [
    {"prompt": f"<image:{CAT}>w5 w6"},
    {"prompt": "w7 w8 w9"},
    {"prompt": f"w3 <image:{ROCKET}>w4 <image:{CAT}>w5"},
    {"prompt": f"<image:{COFFEE}>w5"},
]


@pytest.mark.matrix
@pytest.mark.parametrize("size", [4, 2, 3])
def test_a_batch_of_pictures_of_other_tiles_answers_as_one_by_one(vlm, model, tmp_path, size):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    words = ["--model", model, "--max-new-tokens", 3]
    assert vlm("batch", tmp_path / "in.jsonl", "-o", tmp_path / "out", "--batch-size", size, *words).exit_code == 0
    found = [json.loads(line)["text"] for line in (tmp_path / "out").read_text(encoding="utf-8").splitlines()]
    alone = [json.loads(vlm("generate", "--json", row["prompt"], *words).stdout)["text"] for row in ROWS]
    assert found == alone and len(set(found)) > 1


@pytest.mark.matrix
def test_a_chat_reads_the_tiles_of_each_turn_once(vlm, model):
    lines = f"<image:{CAT}>w5 w6\nw7 <image:{ROCKET}>w8\n"
    result = vlm("chat", model, "--json", "--max-new-tokens", 2, input=lines)
    assert result.exit_code == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert second["reused_positions"] >= first["prompt_positions"] > 40
    assert second["prompt_positions"] > 2 * 40


def test_records_are_counted_by_the_tiles_of_their_pictures(model, tmp_path):
    """A batch of two records gives the losses of each alone; one that is too long says how many tiles would fit."""
    lines = [{"prompt": row["prompt"], "completion": " w9"} for row in (ROWS[0], ROWS[2])]
    (file := tmp_path / "some.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    vlm_model, processor = load(str(model))
    data = load_dataset(file, vlm_model, processor)
    assert data.num_images.tolist() == [7, 7 + 7]
    collate = Collator(0)

    def losses(*indices: int) -> torch.Tensor:
        batch = collate([data[i] for i in indices])
        return losses_of(batch)

    def losses_of(batch: dict[str, Any]) -> torch.Tensor:
        given = {key: x for key, x in batch.items() if isinstance(x, torch.Tensor) and key != "labels"}
        with torch.no_grad():
            return row_losses(vlm_model(**given).logits, batch["labels"], batch["logits_at"])[0]

    assert collate([data[1]])["vision_grid"][0, :, :2].tolist() == [[2, 3], [2, 3]]
    torch.testing.assert_close(losses(0, 1), torch.cat([losses(0), losses(1)]), atol=1e-4, rtol=1e-4)
    packed = collate([join_items([data[0], data[1]])])
    assert packed["segments"].shape == packed["input_ids"].shape and packed["vision_grid"].shape[:2] == (1, 3)
    torch.testing.assert_close(losses_of(packed)[0], losses(0, 1).sum(), atol=1e-4, rtol=1e-4)
    del packed["segments"]
    assert not torch.allclose(losses_of(packed)[0], losses(0, 1).sum(), atol=1e-4, rtol=1e-4)
    small = ContextBudget(vlm_model, 80, None)
    sizes = [processor.image_processor.measure(400, 266)] * 2
    assert small.problem(5, sizes).endswith("Shorten it. 4 tiles of each picture would fit: --max-tiles 4.")
    assert ContextBudget(vlm_model, 20, None).problem(5, sizes).endswith("Shorten it.")
