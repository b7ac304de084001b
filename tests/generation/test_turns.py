"""Rows of turns in `vlm batch`: the last turn is asked behind the turns before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.support.training import write

PICTURE = str(ROOT / "examples" / "images" / "two.png")
ASK = "Describe the image."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_the_last_turn_is_asked_behind_the_others(vlm: Callable[..., Any], tmp_path: Path) -> None:
    before = [user(f"<image>{ASK}"), {"role": "assistant", "content": "a small yellow cross above a large red heart."}]
    rows: list[dict[str, Any]] = [
        {"prompt": f"<image:{PICTURE}>{ASK}"},
        {"messages": [user(f"<image>{ASK}")], "images": [PICTURE]},
        {"image": PICTURE, "conversations": [{"from": "human", "value": ASK}]},
        {"messages": [*before, user("Q: How many things are there? A:")], "images": [PICTURE]},
        {"messages": [user("Q: How many things are there? A:")]},
        {"messages": before, "images": [PICTURE], "id": "answered"},
        {"messages": [], "id": "empty"},
    ]
    out = tmp_path / "out.jsonl"
    found = vlm("batch", write(tmp_path / "in.jsonl", rows), "-o", out, "--dtype", "float32")
    assert found.exit_code == 1
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    whole, messages, conversation, *_ = (x.get("text") for x in answers)
    assert whole == messages == conversation == " a small yellow cross above a large red heart."
    assert answers[3]["text"] == " two." and answers[3]["messages"] == rows[3]["messages"]
    # Without the turns before it, the same question has another prompt, and no picture that could tell.
    assert answers[4]["text"] != answers[3]["text"]
    assert answers[5]["error"] == "line 6: turn 2, the last, is an answer. Leave it out, and a model answers there."
    assert "the model would have nothing to answer" in answers[6]["error"]
