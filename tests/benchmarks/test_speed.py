"""The speed benchmarks run on tiny models and say of a bar what is so. Nothing here looks at a time."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks.speed import decode, encode
from benchmarks.speed.__main__ import QUESTIONS, asked
from benchmarks.speed.measure import Pairs, Skipped, Subject, alternate, compare
from benchmarks.speed.models import SIZES, Models, Prompt
from benchmarks.speed.question import Question, Settings, answer
from benchmarks.speed.results import Bar, Report, page
from tests.support.grid import first_of

ROW = {"size", "case", "ours", "peer", "unit", "ours_median", "peer_median", "ratio", "low", "high", "pairs", "skipped"}
FACTS = {"date", "commit", "versions", "cpu", "weights", "question", "command", "settings", "rows", "bars", "seconds"}


@pytest.mark.parametrize("question", first_of([encode.QUESTION, decode.QUESTION]), ids=lambda question: question.name)
def test_a_quick_run_writes_its_results(question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = decode.variants
    monkeypatch.setattr(  # to compile takes longer than all the rest
        decode, "variants", lambda *given: {name: x for name, x in every(*given).items() if "compile" not in name}
    )
    report = answer(question, Settings(sizes=("tiny",), pairs=2, out=tmp_path))
    (file,) = tmp_path.iterdir()
    data = json.loads(file.read_text(encoding="utf-8"))
    assert file.name == f"{data['date']}-{question.name}.json"
    assert data.keys() >= FACTS and data["versions"].keys() >= {"python", "torch", "transformers", "open_clip_torch"}
    assert data["command"] == f"python -m benchmarks.speed.{question.name} --quick --pairs 2 --threads 1"
    assert data["settings"] | {"pairs": 2, "threads": 1, "dtype": "float32"} == data["settings"]
    assert data["rows"] and all(row.keys() == ROW for row in data["rows"])
    for row in data["rows"]:
        is_reference = row["peer"] == "reference"
        assert row["skipped"] == ("give --open-flamingo PATH" if is_reference else None)
        assert (row["ratio"] is None) == is_reference
        assert is_reference or 0 < row["low"] <= row["ratio"] <= row["high"]
    assert Report.from_dict(data) == report


@pytest.mark.matrix
def test_a_quick_run_of_the_ways_to_run_a_step(tmp_path: Path) -> None:
    from benchmarks.speed import steps

    report = answer(steps.QUESTION, Settings(sizes=("tiny",), pairs=1, out=tmp_path))
    assert len(report.rows) == 6 and all(row.ratio and row.skipped is None for row in report.rows)
    told = [table for table in report.tables if "tokens" in table.head]
    assert len(told) == 2 and all(row[-1].startswith("same tokens") for table in told for row in table.rows)


@pytest.mark.matrix
def test_a_quick_run_of_training(tmp_path: Path) -> None:
    from benchmarks.speed import training  # the Trainer takes seconds to import

    report = answer(training.QUESTION, Settings(sizes=("tiny",), pairs=1, out=tmp_path))
    assert report.rows and all(row.ratio and row.skipped is None for row in report.rows)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("value", "limit", "sense", "verdict"),
    [
        (0.9, 0.9, "at least", "met"),
        (0.899, 0.9, "at least", "MISSED"),
        (1.05, 1.05, "at most", "met"),
        (1.051, 1.05, "at most", "MISSED"),
        (None, 1.05, "at most", "skipped"),
        (3.0, None, "at most", "told"),
    ],
)
def test_verdict(value: float | None, limit: float | None, sense: str, verdict: str) -> None:
    bar = Bar(name="a bar", value=value, limit=limit, sense=sense)
    report = Report("decode", "How fast?", "python -m …", {"threads": 1, "dtype": "float32"}, bars=[bar])
    assert bar.verdict == verdict
    assert report.to_dict()["bars"][0]["verdict"] == verdict
    assert f"| {verdict} |" in page([report], "python -m benchmarks.speed")


@pytest.mark.matrix
def test_every_second_round_goes_the_other_way() -> None:
    ran: list[str] = []

    def run(name: str) -> float:
        ran.append(name)
        return len(ran)

    costs = alternate({name: lambda name=name: run(name) for name in "abc"}, 2)
    assert "".join(ran) == "abcabccba"
    assert costs == {"a": [4, 9], "b": [5, 8], "c": [6, 7]}


@pytest.mark.matrix
@pytest.mark.parametrize("together", [True, False])
def test_ours_over_the_peers(together: bool) -> None:
    def absent() -> None:
        raise Skipped("not here")

    peers = [Subject("twice", lambda: lambda: 4.0), Subject("absent", absent), Subject("half", lambda: lambda: 1.0)]
    found = compare(Subject("ours", lambda: lambda: 2.0), peers, 3, together=together)
    assert list(found) == ["twice", "absent", "half"]
    assert isinstance(found["twice"], Pairs) and (found["twice"].ratio, found["twice"].spread) == (0.5, (0.5, 0.5))
    assert isinstance(found["half"], Pairs) and found["half"].ratio == 2.0  # behind is above 1
    assert str(found["absent"]) == "not here"


def test_peers_get_equal_work(tmp_path: Path) -> None:
    models, prompt = Models(SIZES["tiny"], tmp_path), Prompt(2, batch=3)
    ours, llava = models.ours("llava"), models.llava()
    tokens = ours.model.num_positions()
    length = (3, 2 * tokens + prompt.text)
    assert tuple(llava.inputs(prompt)["input_ids"].shape) == length
    assert tuple(models.bare(tokens).inputs(prompt)["input_ids"].shape) == length
    assert tuple(models.bare(tokens + 1).inputs(prompt)["input_ids"].shape) != length
    sizes = [sum(p.numel() for p in x.parameters()) for x in (ours.model.lang_model, llava.model.model.language_model)]
    assert sizes[0] == sizes[1]


@pytest.mark.matrix
def test_a_device_and_a_dtype_are_told(tmp_path: Path) -> None:
    flags = Settings(sizes=("tiny",), device="cuda", dtype="bfloat16").flags(paths=False)
    assert " ".join(flags).endswith("--device cuda --dtype bfloat16")
    models = Models(SIZES["tiny"], tmp_path, device="meta", dtype=torch.bfloat16)
    for made in (models.ours("llava"), models.llava(), models.bare(4)):
        assert {(p.device.type, p.dtype) for p in made.model.parameters()} == {("meta", torch.bfloat16)}
        inputs = made.inputs(Prompt(1))
        assert {x.device.type for x in inputs.values()} == {"meta"}
        assert {x.dtype for x in inputs.values()} <= {torch.bfloat16, torch.int64}
    assert set(asked("cuda:0")) == {"encode", "prefill", "decode", "steps", "train_step", "batch", "batch_goals"}
    assert asked("cpu") == [name for name in QUESTIONS if name not in ("steps", "batch_goals")]


def test_every_question_is_asked() -> None:
    home = Path(encode.__file__).parent
    asked = {path.stem for path in home.glob("*.py") if "QUESTION = Question(" in path.read_text(encoding="utf-8")}
    assert asked == set(QUESTIONS)
    for name in QUESTIONS:
        assert importlib.import_module(f"benchmarks.speed.{name}").QUESTION.name == name


@pytest.mark.parametrize("name", ["measure", "results"])
def test_doctests(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"benchmarks.speed.{name}"))
    assert found.attempted and not found.failed
