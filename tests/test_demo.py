"""The model that ships with the package answers what its pictures show, and only because it sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlm_cli
from tests.support import ROOT
from tests.support.grid import first_rows
from vlm_cli.cli.app import app
from vlm_cli.files import is_vlm_directory
from vlm_cli.models import DEMO

IMAGES = ROOT / "examples" / "images"
ANSWERS = [
    ("one", "Describe the image.", "a small green cross."),
    ("two", "Describe the image.", "a small yellow cross above a large red heart."),
    ("three", "Describe the image.", "a small blue triangle, a large yellow triangle and a large purple circle."),
    ("three", "Q: How many things are there? A:", "three."),
    ("three", "Q: How many triangles are there? A:", "two."),
    ("three", "Q: What colour is the circle? A:", "purple."),
    ("two", "Q: What shape is the red thing? A:", "heart."),
    ("two", "Q: Is there a heart? A:", "yes."),
    ("two", "Q: Is there a circle? A:", "no."),
    ("one", "Q: What size is the cross? A:", "small."),
]


def ask(prompt: str, *options: str) -> str:
    result = CliRunner().invoke(app, ["generate", prompt, *options])
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


@pytest.mark.sample(2)
@pytest.mark.parametrize(("picture", "question", "answer"), first_rows(ANSWERS, 4))
def test_shipped_pictures_get_their_known_answers(picture: str, question: str, answer: str) -> None:
    assert ask(f"<image:{IMAGES / picture}.png>{question}") == answer


def test_another_picture_gets_another_answer() -> None:
    assert ask(f"<image:{IMAGES / 'one.png'}>Describe the image.") != ANSWERS[1][2]


def test_examples_in_the_prompt_say_what_is_asked() -> None:
    one, two, three = (f"<image:{IMAGES / name}.png>" for name in ("one", "two", "three"))
    assert ask(f"{two} Output: two.{three} Output: three.{one} Output:") == "one."


def test_it_is_a_directory_like_any_other_and_small() -> None:
    assert is_vlm_directory(DEMO)
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 6e6
    model, processor = vlm_cli.load("demo")
    assert model.config.composition.family is None and processor.tokenizer.pad_token


def test_its_report_names_what_made_it() -> None:
    recipe = json.loads((DEMO / "recipe.json").read_text(encoding="utf-8"))
    assert {"recipe", "versions", "results"} <= recipe.keys() and "seed" in recipe["recipe"]


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["generate", "--model", "demo", "text"])
    assert result.exit_code == 1 and "config.json" in result.stderr


def test_the_documentation_says_what_was_measured() -> None:
    results = json.loads((DEMO / "recipe.json").read_text(encoding="utf-8"))["results"]
    page = (IMAGES.parents[1] / "docs" / "usage.md").read_text(encoding="utf-8")

    def share(asked: str, *kinds: str) -> str:
        scores = [score for score in results[asked] if score["kind"] in kinds]
        return (
            f"{100 * sum(s['exact'] for s in scores) / sum(s['items'] for s in scores):.1f}".removesuffix(".0") + " %"
        )

    captions, few_shot = [f"caption-{i}" for i in (1, 2, 3)], "few-shot"
    questions = [s["kind"] for s in results["held-out"] if s["kind"] not in (*captions, few_shot)]
    for title, groups in (
        ("captions of one, two, three things", [[kind] for kind in captions]),
        ("questions", [questions]),
        ("examples in the prompt, then a picture", [[few_shot]]),
    ):
        cells = (", ".join(share(asked, *group) for group in groups) for asked in ("held-out", "wrong-image"))
        assert f"| {title} | {' | '.join(cells)} |" in page
