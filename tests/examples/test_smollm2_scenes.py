"""The records of the recipe smollm2-scenes are chat messages that `vlm` reads, and its control shows other scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples.recipes.smollm2_scenes import QUESTIONS, write_records


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
