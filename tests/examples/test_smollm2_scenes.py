"""The recipe smollm2-scenes: its records are chat messages, its control shows other scenes, its words are a model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.recipes import smollm2_scenes
from examples.recipes.smollm2_scenes import QUESTIONS, write_records, write_words
from vlm_cli.errors import CheckpointError
from vlm_cli.manifest import compare_files, sign


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_records(tmp_path: Path) -> None:
    write_records(tmp_path / "data", 3, 4, seed=0)
    train, held_out, wrong = (
        read(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "held-out", "wrong-image")
    )
    assert [len(x["messages"]) for x in train] == [2 * QUESTIONS] * 3
    for record in (*train, *held_out):
        roles = [message["role"] for message in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        kinds = [part["type"] for message in record["messages"] for part in message["content"]]
        assert kinds.count("image") == len(record["images"]) == 1
    for right, control in zip(held_out, wrong, strict=True):
        assert right["messages"] == control["messages"] and right["kind"] == control["kind"]
        pictures = [(tmp_path / "data" / x["images"][0]).read_bytes() for x in (right, control)]
        assert pictures[0] != pictures[1]
    write_records(tmp_path / "again", 3, 4, seed=0)
    assert read(tmp_path / "again/train.jsonl") == train


def test_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2_scenes, "LENGTH", 12)
    monkeypatch.setattr(smollm2_scenes, "OPENINGS", "a two")
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        write_words("demo", tmp_path / name, 6, seed)
    first, again, other = (read(tmp_path / name) for name in ("first", "again", "other"))
    assert first and first == again != other
    assert all(record.keys() == {"text"} and record["text"][0] in "at" for record in first)


def test_adapters_that_count_less(tmp_path: Path) -> None:
    """The adapter of a copy adds half as much; what stays of the model is the same."""
    model, out = tmp_path / "model", tmp_path / "out"
    config = model / "adapters/language_model/adapter_config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"r": 16, "lora_alpha": 32, "peft_type": "LORA"}))
    (model / "config.json").write_text("{}")
    sign(model)
    smollm2_scenes.scale_adapters(model, out, 0.5)
    found = json.loads((out / config.relative_to(model)).read_text())
    assert found == {"r": 16, "lora_alpha": 16.0, "peft_type": "LORA"}
    report = compare_files(out, verify=True)
    assert report is not None and not report.wrong and not report.edited
    with pytest.raises(CheckpointError, match="exists"):
        smollm2_scenes.scale_adapters(model, out, 0.5)
    with pytest.raises(CheckpointError, match="has no adapter"):
        smollm2_scenes.scale_adapters(tmp_path, tmp_path / "other", 0.5)
