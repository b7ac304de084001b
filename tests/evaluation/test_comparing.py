"""`vlm eval` with metrics, with two models, and with controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.questions import COLOURS, Write
from vlm_cli.cli.app import app
from vlm_cli.errors import DataError
from vlm_cli.evaluation.comparison import mcnemar
from vlm_cli.evaluation.controls import control_items
from vlm_cli.evaluation.items import read_items
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import Medium, format

SHORT = ["--max-new-tokens", "4"]
ROWS = [
    {"prompt": f"<image:{x}.png>Q: {word}? A:", "completion": f" {x}", "choices": list(COLOURS), "kind": word}
    for x in COLOURS
    for word in ("colour", "shade")
]


def evaluate(*words: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["eval", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def compared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """Two models on the same items: the report, the page, and what stderr says."""
    page = tmp_path_factory.mktemp("compared") / "page.html"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["stream", "attention", "--data", "rows.jsonl", "--metric", "choice-likelihood-mean,anls", *SHORT]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, stdout, stderr = evaluate(*words, "--json", "--html", page)
    assert code == 0, stderr
    return json.loads(stdout), page.read_text(encoding="utf-8"), stderr


def test_two_models_are_compared_on_the_same_items(compared: tuple[dict[str, Any], str, str]) -> None:
    report, page, _ = compared
    first, second = report["models"]
    assert [first["model"], second["model"]] == ["stream", "attention"]
    [comparison] = report["comparisons"]
    right, near = comparison["differences"]
    marks = [[x["scores"]["choice-likelihood-mean"] for x in model["answers"]] for model in (first, second)]
    only = [sum(a > b for a, b in zip(*pair, strict=True)) for pair in (marks, marks[::-1])]
    assert [right["only_first_right"], right["only_second_right"]] == only
    assert right["p_value"] == pytest.approx(mcnemar(*only)) and right["test"] == "McNemar"
    assert right["difference"] == pytest.approx((sum(marks[1]) - sum(marks[0])) / len(ROWS))
    assert near["test"] == "paired bootstrap" and 0 < near["p_value"] <= 1
    low, high = near["interval"]
    assert low <= near["difference"] <= high
    for model in (first, second):
        assert set(model["total"]["scores"]) == {"choice-likelihood-mean", "anls"}
        assert [x["kind"] for x in model["kinds"]] == ["colour", "shade"]
    assert page.count("<caption>") == 2 and page.count("<dt>stream</dt>") == page.count("<dt>attention</dt>") == 8


def test_each_model_answers_as_it_does_alone(compared: tuple[dict[str, Any], str, str]) -> None:
    alone = json.loads(evaluate("attention", "--data", "rows.jsonl", "--metric", "anls", *SHORT, "--json")[1])
    together = compared[0]["models"][1]
    assert [x["answer"] for x in alone["answers"]] == [x["answer"] for x in together["answers"]]
    assert alone["total"]["scores"]["anls"] == together["total"]["scores"]["anls"]


def test_the_table_of_two_models_and_the_metric_that_the_data_choose() -> None:
    code, stdout, stderr = evaluate("stream", "attention", "--data", "rows.jsonl", *SHORT, "--limit", 2)
    assert code == 0, stderr
    assert "Metric: multiple-choice, since each item has choices" in stderr
    assert "attention (second) against stream (first)" in stdout and "difference" in stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--metric", "vqaa"], 2, "unknown metric 'vqaa'. Did you mean 'vqa'?"),
        (["--metric", "vqa"], 1, "the metric vqa does not fit these records: it compares with the answers of several"),
        (["--metric", "yes-no"], 1, "the answer of line 1 of rows.jsonl is 'red'"),
        (["--metric", "mme"], 1, "line 1 of rows.jsonl shows none"),
        (["--control", "wrong"], 2, "unknown --control 'wrong'. Did you mean 'wrong-image'?"),
        (["stream"], 2, "the model 'stream' is given twice"),
    ],
)
def test_bad_requests(words: list[str], code: int, says: str, compared: object) -> None:
    ended, stdout, stderr = evaluate("stream", *words, "--data", "rows.jsonl")
    assert (ended, stdout) == (code, "") and says in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("name", ["choice-likelihood", "choice-likelihood-mean"])
def test_choices_that_begin_alike(name: str, write: Write) -> None:
    row = {"prompt": "<image:red.png>Q:", "completion": " red", "choices": ["red", "red car"]}
    code, _, stderr = evaluate("stream", "--data", write([row], "alike.jsonl"), "--metric", name, *SHORT)
    told = (
        "the choice 'red' is the beginning of 'red car'" in stderr and "Use --metric choice-likelihood-mean" in stderr
    )
    assert (code, told) == ((1, True) if name == "choice-likelihood" else (0, False))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answers": "red"}, '"answers" must be a list of texts, got text.'),
        ({"choices": ["a", 1]}, '"choices" must be a list of texts, got a list.'),
    ],
)
def test_answers_that_are_no_texts(row: dict[str, Any], says: str, write: Write) -> None:
    code, _, stderr = evaluate("stream", "--data", write([{**ROWS[0], **row}], "bad.jsonl"))
    assert code == 1 and says in stderr


# -- controls ----------------------------------------------------------------------------------------------------------


def test_no_question_meets_its_own_picture(folder: Path, write: Write) -> None:
    (folder / "copy.png").write_bytes((folder / "red.png").read_bytes())  # the same picture by another name
    names = [*COLOURS, "copy"]
    items, _ = read_items(write([{"prompt": f"<image:{x}.png>Q:", "completion": "x"} for x in names]))
    control_items(items, "wrong-image", MediaLoader(folder))
    shown = [part.source for item in items for part in item.prompt if isinstance(part, Medium)]
    pictures = {name: (folder / f"{name}.png").read_bytes() for name in names}
    assert len(shown) == 5 and set(shown) >= {"red.png"}
    assert all((folder / x).read_bytes() != pictures[name] for name, x in zip(names, shown, strict=True))


def test_no_image(folder: Path, write: Write) -> None:
    items, _ = read_items(write([{"prompt": "<image:red.png>Q:<image:blue.png> A:", "completion": "x"}]))
    control_items(items, "no-image", MediaLoader(folder))
    assert format(items[0].asked) == "Q: A:"


@pytest.mark.parametrize(
    ("control", "prompt", "says"),
    [
        ("wrong-image", "<image:red.png>Q:", "all items show the same one"),
        ("wrong-image", "Q:", "no item shows one"),
        ("no-image", "<image:red.png>", "leaves nothing of the prompt of line 1 of data.jsonl"),
    ],
)
def test_controls_that_say_nothing(control: Any, prompt: str, says: str, folder: Path, write: Write) -> None:
    items, _ = read_items(write([{"prompt": prompt, "completion": "x"}] * 2))
    with pytest.raises(DataError, match=says):
        control_items(items, control, MediaLoader(folder))


@pytest.mark.matrix
def test_a_control_changes_the_answers(compared: object) -> None:
    plain, other = (
        json.loads(evaluate("stream", "--data", "rows.jsonl", *SHORT, *words, "--json")[1])
        for words in ([], ["--control", "wrong-image"])
    )
    assert other["control"] == "wrong-image" and "control" not in plain
    assert [x["answer"] for x in plain["answers"]] != [x["answer"] for x in other["answers"]]


def test_a_table_names_its_control(compared: object) -> None:
    assert evaluate("stream", "--data", "rows.jsonl", *SHORT, "--control", "no-image")[1].startswith("no-image\n")
