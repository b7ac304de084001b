"""`vlm data`: what it tells of files, compared with the files themselves, and with what a run learns."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.training import write
from vlm_cli.models import load
from vlm_cli.training.dataset import load_dataset

Vlm = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, and rows about them in several formats; the rows of `bad.jsonl` cannot all be used."""
    out = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (40, 30), "red").save(out / "red.png")
    Image.new("RGB", (64, 64), "blue").save(out / "blue.png")
    asked = {"from": "human", "value": "<image>\nWhich colour?"}
    rows: list[dict[str, Any]] = [
        {"id": "a", "image": "red.png", "conversations": [asked, {"from": "gpt", "value": "Red."}]},
        {"id": "a", "image": "blue.png", "conversations": [asked, {"from": "gpt", "value": "Blue."}]},
        {"id": "b", "texts": [{"user": "One?", "assistant": "Yes."}, {"user": "Two?", "assistant": "No."}]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image> <image>"},
                      {"role": "assistant", "content": "Both."}], "images": ["red.png", "blue.png"]},
    ]  # fmt: skip
    write(out / "good.jsonl", rows)
    write(out / "bad.jsonl", [*rows, rows[0] | {"image": "green.png"}, {"x": 1}, {"x": 2}])
    (out / "array.json").write_text(json.dumps(rows))
    return out


@pytest.fixture
def report(vlm: Vlm) -> Callable[..., list[dict[str, Any]]]:
    """Runs the command, and returns what it tells of each source."""

    def run(*words: Any) -> list[dict[str, Any]]:
        found = vlm("data", *words, "--json")
        assert found.exit_code == 0, found.stderr
        sources: list[dict[str, Any]] = json.loads(found.stdout)["sources"]
        return sources

    return run


def test_counts_are_those_of_the_file(report: Callable[..., Any], folder: Path) -> None:
    lines, array = report(str(folder / "good.jsonl"), str(folder / "array.json"))
    assert (lines["kind"], array["kind"]) == ("JSON lines", "JSON array")
    for found in (lines, array):
        assert (found["rows"], found["bad_rows"], found["systems"]) == (4, 0, 1)
        assert found["formats"] == {"LLaVA conversations": 2, "texts of FineVision": 1, "chat messages": 1}
        assert found["images"] == {"0": 1, "1": 2, "2": 1} and found["clips"] == {"0": 4}
        assert found["turns"] == {"1": 3, "2": 1}
        assert found["sizes"] == [{"width": 40, "height": 30, "images": 2}, {"width": 64, "height": 64, "images": 2}]
        assert found["repeated_ids"] == {"a": 2}
        lengths = found["lengths"]["characters"]
        assert (lengths["least"], lengths["most"]) == (len("Be brief. Both."), len("One?Yes.Two?No.") + 4)


def test_lengths_are_those_that_a_run_learns(report: Callable[..., Any], folder: Path) -> None:
    (found,) = report(str(folder / "good.jsonl"), "--model", "demo", "--show", "4")
    expected = load_dataset(folder / "good.jsonl", *load("demo"))
    # The model learns each answer of a conversation in a sequence of its own: the third row has two.
    rows = [[0], [1], [2, 3], [4]]
    learned_here = [int(expected.is_target[a:b].sum()) for a, b in zip(expected.ends, expected.ends[1:], strict=False)]
    lengths = [max(expected.lengths[i].item() for i in row) for row in rows]
    assert len(expected.lengths) == 5 and [x["tokens"] for x in found["examples"]] == lengths
    assert [x["learned"] for x in found["examples"]] == [sum(learned_here[i] for i in row) for row in rows]
    assert [found["lengths"]["tokens"][x] for x in ("least", "most")] == [min(lengths), max(lengths)]
    learned = ["".join(x["text"] for x in row["pieces"] if x.get("learned")) for row in found["examples"]]
    assert [x.split("<")[0].strip() for x in learned] == [
        "Red.",
        "Blue.",
        "Yes.",
        "Both.",
    ]
    assert [x["image"] for x in found["examples"][3]["pieces"] if "image" in x] == ["red.png", "blue.png"]


def test_bad_rows_are_listed_and_end_the_command(vlm: Vlm, folder: Path) -> None:
    found = vlm("data", str(folder / "bad.jsonl"))
    assert found.exit_code == 1
    assert found.stderr.splitlines()[-1] == "Error: 3 of 7 rows cannot be used, and `vlm train` would refuse them."
    assert "  line 5 of bad.jsonl\n    cannot find 'green.png'" in found.stdout
    assert "  line 6 of bad.jsonl, line 7 of bad.jsonl\n    has neither" in found.stdout
    assert "  rows      4, and 3 that cannot be used" in found.stdout


def test_what_is_learned_is_marked(vlm: Vlm, folder: Path) -> None:
    found = vlm("data", str(folder / "good.jsonl"), "--show", "9")
    assert "line 1 of good.jsonl ('a')\n    <image:red.png>\n    Which colour?\n    ⟦Red.⟧\n" in found.stdout
    assert "line 4 of good.jsonl\n    Be brief.\n    <image:red.png> <image:blue.png>\n    ⟦Both.⟧\n" in found.stdout
    assert all(len(line) <= 80 for line in found.stdout.splitlines())


def test_the_seed_chooses_the_rows(vlm: Vlm, folder: Path) -> None:
    shown = [vlm("data", str(folder / "good.jsonl"), "--show", "1", "--seed", str(i)).stdout for i in range(8)]
    places = {re.findall("line . of good", text)[0] for text in shown}
    assert len(places) > 1
    assert vlm("data", str(folder / "good.jsonl"), "--show", "1", "--seed", "3").stdout == shown[3]


def test_columns_and_folders_are_those_of_a_run(report: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "table.jsonl", [{"q": "Which?", "a": "Red.", "pic": "red.png"}])
    (found,) = report(str(path), "--columns", "prompt=q,completion=a,images=pic", "--image-folder", str(folder))
    assert found["images"] == {"1": 1} and found["formats"] == {"columns": 1}


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["nope.jsonl"], 1, "cannot find the records 'nope.jsonl'"),
        (["empty.jsonl"], 1, "'empty.jsonl' holds no records."),
        (["good.jsonl", "--special-tokens"], 2, "--special-tokens needs --model"),
        (["good.jsonl", "--columns", "prompt"], 2, "--columns expects NAME=COLUMN, got 'prompt'"),
        (["good.jsonl", "--model", "nothing"], 2, "nothing"),
    ],
)
def test_wrong_words_are_explained(
    vlm: Vlm, folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, error: str
) -> None:
    (folder / "empty.jsonl").write_text("")
    monkeypatch.chdir(folder)
    found = vlm("data", *words)
    assert found.exit_code == code and error in found.stderr
    assert "Traceback" not in found.stderr
