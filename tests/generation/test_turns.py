"""Rows of every format in `vlm batch`: the last question is asked behind the turns before it."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

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
    # An answer that the row has is not read: the same question is asked.
    assert answers[5]["text"] == whole and answers[5]["messages"] == before
    assert "Note: line 6 has an answer already, which the model does not see." in found.stderr
    assert "the model would have nothing to answer" in answers[6]["error"]


LLAVA = {"image": PICTURE, "conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": "x"}]}
PART = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASK}]}
HELD = {"role": "user", "content": [{"type": "image", "path": PICTURE}, {"type": "text", "text": ASK}]}
ONE = {"prompt": ASK, "completion": "x"}
#: Rows of each format that ask for a description of the picture, with an answer or without.
DESCRIBE: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": f"<image:{PICTURE}>{ASK}", "completion": "x"},
    "turns": {"prompt": f"<image:{PICTURE}>", "turns": [ONE]},
    "open turns": {"prompt": "", "images": [PICTURE], "turns": [{"prompt": ASK}]},
    "messages beside": {"messages": [PART, {"role": "assistant", "content": "x"}], "images": [PICTURE]},
    "messages with pictures": {"messages": [HELD]},
    "split messages": {"prompt": [HELD]},
    "LLaVA": LLAVA,
    "FineVision": {"images": [PICTURE], "texts": [{"user": ASK, "assistant": "x"}]},
    "open FineVision": {"images": [PICTURE], "texts": [{"user": ASK}]},
}


def test_every_format_asks_the_same(vlm: Callable[..., Any], tmp_path: Path) -> None:
    other = json.loads(json.dumps(LLAVA).replace("two.png", "three.png"))
    out = tmp_path / "out.jsonl"
    found = vlm("batch", write(tmp_path / "in.jsonl", [*DESCRIBE.values(), other]), "-o", out, "--dtype", "float32")
    assert found.exit_code == 0, found.stderr
    answers = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    wanted = " a small yellow cross above a large red heart."
    assert dict(zip(DESCRIBE, answers, strict=False)) == dict.fromkeys(DESCRIBE, wanted)
    assert answers[-1] != wanted
    assert "line 2 has an answer already, which the model does not see. 4 more lines do the same." in found.stderr


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["parquet", "arrow", "json", "tar"])
def test_rows_come_from_every_source(vlm: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    """A row group, a batch, an array or a shard holds the pictures, and the answers are in the order of the rows."""
    names = ("one.png", "two.png", "three.png")
    rows = [
        {"question": ASK, "image": (ROOT / "examples" / "images" / name).read_bytes(), "n": i, "no": math.nan}
        for i, name in enumerate(names)
    ]
    flags = ["--columns", "prompt=question,image=image"]
    data = tmp_path / f"rows.{kind}"
    if kind == "tar":
        with tarfile.open(data, "w") as shard:
            for row in rows:
                about = json.dumps({"question": ASK, "n": row["n"]}).encode()
                for ending, raw in (("json", about), ("png", row["image"])):
                    member = tarfile.TarInfo(f"{row['n']}.{ending}")
                    member.size = len(raw)
                    shard.addfile(member, BytesIO(raw))
        flags = ["--columns", "prompt=question,images=images"]
    elif kind == "json":
        for row, name in zip(rows, names, strict=True):
            row |= {"image": name, "no": None}
        data.write_text(json.dumps(rows, indent=1))
        flags += ["--image-folder", ROOT / "examples" / "images"]
    elif kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow_table(rows), data, row_group_size=2)
    else:
        with pytest.importorskip("pyarrow").ipc.new_file(data, pyarrow_table(rows).schema) as file:
            file.write_table(pyarrow_table(rows), 2)
    out = tmp_path / "out.jsonl"
    found = vlm("batch", data, *flags, "-o", out, "--dtype", "float32", "--workers", 0)
    assert found.exit_code == 0, found.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["n"] for row in answers] == [0, 1, 2] and all(row["question"] == ASK for row in answers)
    assert answers[1]["text"] == " a small yellow cross above a large red heart."
    assert len({row["text"] for row in answers}) == 3
    if kind in ("parquet", "arrow"):
        assert answers[0]["no"] is None
        assert answers[2]["image"] == f"inside:rows.{kind}#3/image"  # the name of the picture, and not its bytes


def pyarrow_table(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("pyarrow").Table.from_pylist(rows)


def part(**values: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [values]}]}


BAD: list[tuple[dict[str, Any], str]] = [
    (part(type="sound"), "unknown type 'sound'. Known: text, image"),
    (part(type="image"), "has 1 placeholder <image>, but 0 pictures"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
    ({"texts": [{"user": ""}]}, "turn 1, of the user, is empty"),
    ({"prompt": "", "turns": [{"prompt": " "}]}, "asks nothing: its last prompt is empty."),
    ({"custom_id": "1", "url": "/v1/embeddings", "body": {}}, "is a request of OpenAI's protocol among other rows"),
]


def test_bad_rows_are_told_in_place(vlm: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"prompt": "One"}, *(row for row, _ in BAD), {"prompt": "Two"}]
    found = vlm("batch", write(tmp_path / "in.jsonl", rows), "-o", tmp_path / "out.jsonl", "-n", 1)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found.exit_code == 1 and ["error" in x for x in answers] == [False, *[True] * len(BAD), False]
    for answer, (_, words) in zip(answers[1:-1], BAD, strict=True):
        assert words in answer["error"]


def test_columns_of_questions_need_no_answer(vlm: Callable[..., Any], tmp_path: Path) -> None:
    for flag, words in (
        ("images=image", "must name a prompt, or one of"),
        ("prompt=a,messages=b", "must name a prompt"),
    ):
        found = vlm("batch", write(tmp_path / "in.jsonl", [{}]), "-o", tmp_path / "out.jsonl", "--columns", flag)
        assert found.exit_code == 2 and words in found.stderr
    rows = write(tmp_path / "in.jsonl", [{"q": "One"}, {"question": "Two"}])
    assert vlm("batch", rows, "-o", tmp_path / "out.jsonl", "--columns", "prompt=question", "-n", 1).exit_code == 1
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first["error"] == 'line 1: has no column "question". It has: q.'
