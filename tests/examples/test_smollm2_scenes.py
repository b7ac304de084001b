"""The recipe smollm2-scenes: its records are chat messages, its control shows other scenes, its words are a model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.recipes import smollm2_scenes
from examples.recipes.smollm2_scenes import QUESTIONS, write_records, write_words


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
