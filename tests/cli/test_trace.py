"""`vlm trace` on the demo: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support import ROOT
from vlm_cli.cli.trace import _number

TWO = ROOT / "examples/images/two.png"
PROMPT = f"<image:{TWO}>Describe the image."
ANSWER = " a small yellow cross above a large red heart."

pytestmark = pytest.mark.usefixtures("loaded_once")


def test_the_answer_and_its_words(vlm: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "seen.png"
    result = vlm("trace", PROMPT, "--png", out, "--html", tmp_path / "seen.html", "--grid", 4)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == ANSWER
    assert "falls without" in result.stdout and "attends to" in result.stdout
    assert f"Wrote {out}" in result.stderr
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and sheet.height > 10 * 128
    assert (tmp_path / "seen.html").read_text(encoding="utf-8").count("data-word=") == 10


def test_json(vlm: Callable[..., Any]) -> None:
    result = vlm("trace", "demo", PROMPT, "--json", "--no-occlusion", "--top", 2)
    found = json.loads(result.stdout)
    assert found["model"] == "demo" and found["answer"] == ANSWER
    assert {x["measure"] for x in found["maps"]} == {"attention"}
    assert [len(x["alternatives"]) for x in found["words"]] == [2] * 10
    assert found["layout"]["positions"] == len(found["layout"]["ids"])
    assert {x["kind"] for x in found["layers"]} == {"block", "layer"} and len(found["gates"]) == 8


def test_another_answer_is_traced(vlm: Callable[..., Any]) -> None:
    result = vlm("trace", "-m", "demo", PROMPT, "--answer", " a large blue star.", "--no-occlusion", "--json")
    found = json.loads(result.stdout)
    assert found["answer"] == " a large blue star."
    assert [x["text"] for x in found["words"]] == [" a", " large", " blue", " star", "."]
    assert found["words"][2]["probability"] < 0.01


def test_the_model_may_stand_before_options_that_bring_the_prompt(vlm: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    result = vlm("trace", "demo", "-f", file, "--no-occlusion", "-n", 1)
    assert result.exit_code == 0 and result.stdout.startswith(" a\n")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["What is it?"], 2, "the prompt shows no picture, so there is nothing to trace. Show one: vlm trace"),
        (["demo", PROMPT, "-m", "other"], 2, "the model is given twice, as 'demo' and as --model 'other'."),
        (["demo"], 2, "'demo' was read as the prompt, and the prompt shows no picture. Write one after the model"),
        ([PROMPT, "--png", "a.jpg"], 2, "--png writes no .jpg. Give a name that ends in .png."),
        ([PROMPT, "--html", "-"], 2, "- means standard output, which gets the answer."),
        ([PROMPT, "--answer", ""], 2, "--answer needs a text"),
        ([PROMPT, "--grid", "0"], 2, "--grid"),
        (["nowhere", PROMPT], 2, "unknown model 'nowhere'"),
        (["<image:nowhere.png>A"], 1, "nowhere.png"),
        ([PROMPT, "--png", "a", "--html", "a"], 2, "--html and --png both name 'a'"),
        ([PROMPT, "--png", "/nowhere/a.png"], 1, "/nowhere"),
    ],
)
def test_wrong_usage_is_refused(vlm: Callable[..., Any], words: list[str], code: int, message: str) -> None:
    result = vlm("trace", *words)
    assert result.exit_code == code and message in result.stderr, result.output
    assert not result.stdout


def test_a_word_that_cannot_be_seen_is_quoted_and_zero_has_no_sign(vlm: Callable[..., Any]) -> None:
    result = vlm("trace", PROMPT, "--answer", " ", "--grid", 1, "--top", 1)
    assert "\n ' ' " in result.stdout
    assert _number(-0.04) == "0.0" and _number(-0.06) == "-0.1"


def test_a_file_that_exists_is_kept(vlm: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "seen.png"
    out.write_text("mine")
    result = vlm("trace", PROMPT, "--png", out, "--no-occlusion")
    assert result.exit_code == 2 and "--overwrite" in result.stderr and out.read_text() == "mine"
    assert vlm("trace", PROMPT, "--png", out, "--no-occlusion", "--overwrite", "-n", 1).exit_code == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_one_pixel(vlm: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "dot.png"
    Image.new("RGB", (1, 1), "red").save(out)
    result = vlm("trace", f"<image:{out}>Q: What colour is it? A:", "--json", "-n", 2)
    found = json.loads(result.stdout)
    assert all(len(x["values"]) == len(x["values"][0]) == 1 for x in found["maps"])
