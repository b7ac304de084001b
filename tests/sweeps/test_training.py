"""`vlm sweep` with data: the same training for each composition, and one table."""

from __future__ import annotations

import csv
import itertools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.sweeps import PERCEIVER, launch_here

TRAIN = ("--data", "train.jsonl", "--eval-data", "train.jsonl", "--budget", "1", "--batch-size", "2", "--limit", "6")
SETS = ("--set", f"vision_tokenizer=linear,{PERCEIVER}")


@pytest.fixture(scope="module")
def done(prepared: Path, tmp_path_factory: pytest.TempPathFactory, vlm) -> Any:
    """A sweep of two compositions and two seeds, its words, and what it printed."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        ran = launch_here(patch)
        words = ["sweep", "base.yaml", *SETS, "--seeds", "0,1", *TRAIN, "--output", folder / "out"]
        result = vlm(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return folder / "out", words, ran, json.loads(result.stdout)


def scores(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["compositions"]


@pytest.mark.matrix
def test_each_run_is_built_trained_and_asked_with_its_seed(done):
    out, _, ran, _ = done
    assert [words[0] for words in ran] == ["build", "train", "eval"] * 4
    assert [words[words.index("--seed") + 1] for words in ran if words[0] == "build"] == ["0", "0", "1", "1"]
    for words in ran:
        if words[0] == "train":
            record = json.loads((Path(words[words.index("--output") + 1]) / "training_args.json").read_text())
            assert record["settings"]["max_steps"] == record["result"]["steps"] == 1
            assert record["settings"]["batch_size"] == 2
            assert record["settings"]["seed"] == int(words[words.index("--seed") + 1] if "--seed" in words else 0)
    folders = sorted((out / "runs").glob("*/"))
    assert len(folders) == 4
    for folder in folders:
        kept = [shlex.split(line)[1] for line in (folder / "commands.sh").read_text().splitlines()[1:]]
        assert kept == ["build", "train", "eval"]
        assert (folder / "trained/config.json").is_file()
        assert not (folder / "start").exists()


@pytest.mark.matrix
def test_the_table_holds_what_vlm_eval_found(done):
    out, _, _, printed = done
    assert printed["compositions"] == scores(out)
    for row in printed["compositions"]:
        right = 0
        for run in row["runs"]:
            [file] = (out / "runs" / run["directory"]).glob("scores-*.json")
            found = json.loads(file.read_text())["total"]
            assert run["scores"] == found["scores"]
            right += found["scores"]["exact"]["right"]
        score = row["scores"]["exact"]
        assert score["value"] == pytest.approx(right / 12)
        assert score["interval"][0] <= score["value"] <= score["interval"][1]
    base, other = printed["compositions"]
    assert (base["is_base"], base["against_base"], other["is_base"]) == (True, [], False)
    [difference] = other["against_base"]
    assert difference["difference"] == pytest.approx(
        other["scores"]["exact"]["value"] - base["scores"]["exact"]["value"]
    )


@pytest.mark.matrix
def test_all_forms_of_the_table_agree(done):
    out, _, _, printed = done
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [float(row["score"]) for row in rows] == [x["scores"]["exact"]["value"] for x in printed["compositions"]]
    assert [int(row["parameters"]) for row in rows] == [x["parameters"] for x in printed["compositions"]]
    page, table = (out / "results.html").read_text(), (out / "results.md").read_text()
    for row in printed["compositions"]:
        shown = f"{100 * row['scores']['exact']['value']:.1f} %"
        assert shown in page
        assert shown in table
    assert page.count("<circle") == 2 * page.count("<figure>") > 0


@pytest.mark.matrix
def test_the_same_command_repeats_nothing_and_more_seeds_add_runs(done, prepared, vlm, monkeypatch, tmp_path):
    out, words, _, printed = done
    monkeypatch.chdir(prepared)
    ran = launch_here(monkeypatch, pretends=True)
    again = vlm(*words, "--json")
    assert ran == []
    again_rows, rows = (x["compositions"] for x in (json.loads(again.stdout), printed))
    assert [x["scores"] for x in again_rows] == [x["scores"] for x in rows]
    copy = shutil.copytree(out, tmp_path / "out")
    more = [copy if x == out else "1,2" if x == "0,1" else x for x in words]
    assert vlm(*more).exit_code == 0
    assert [x[0] for x in ran] == ["build", "train", "eval"] * 2
    assert all(x[x.index("--seed") + 1] == "2" for x in ran if x[0] != "eval")


@pytest.mark.matrix
@pytest.mark.parametrize("pretends", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_its_file_repeats_it(done, vlm, monkeypatch, tmp_path, pretends):
    out, _, first, printed = done
    values = yaml.safe_load((out / "sweep.yaml").read_text())
    assert values["seeds"] == [0, 1]
    assert set(values["made_with"]["versions"]) >= {"vlm_cli", "torch", "transformers"}
    assert len(values["made_with"]["inputs"]) == 3  # records, tower, language model
    monkeypatch.chdir(tmp_path)  # paths start at the file
    ran = launch_here(monkeypatch, pretends=pretends)
    result = vlm("sweep", out / "sweep.yaml", "--output", tmp_path / "other", "--json")
    assert result.exit_code == 0, result.stderr
    assert "another than when" not in result.stderr
    assert [[x for x in words if "/" not in x] for words in ran] == [
        [x for x in words if "/" not in x and x != "train.jsonl"] for words in first
    ]
    again = json.loads(result.stdout)["compositions"]
    assert [x["values"] for x in again] == [x["values"] for x in printed["compositions"]]
    if not pretends:
        assert [x["scores"] for x in again] == [x["scores"] for x in printed["compositions"]]


@pytest.mark.matrix
def test_words_on_the_command_line_cover_a_file(done, vlm, monkeypatch, tmp_path):
    out, _, _, _ = done
    monkeypatch.chdir(tmp_path)
    ran = launch_here(monkeypatch, pretends=True)
    words = ["--seeds", "5", "--learning-rate", "fusion=1e-3,others=1e-4", "--set", "train.lora=[language_model]"]
    words += ["--set", "vision_tokenizer=mlp", "--no-group-by-length", "--set", "trainable=[fusion,added_tokens]"]
    assert vlm("sweep", out / "sweep.yaml", "--output", tmp_path / "other", *words).exit_code == 0
    [_, train, _] = ran
    given = dict(itertools.pairwise(train))
    assert given["--learning-rate"] in ("fusion=0.001,0.0001", "0.0001,fusion=0.001")
    assert (given["--lora"], given["--seed"]) == ("language_model", "5")
    assert "--no-group-by-length" in train
    assert (tmp_path / "other/runs").is_dir()
    [start] = (tmp_path / "other/runs").glob("*/start")  # its adapters need it
    assert start.is_dir()


@pytest.mark.matrix
def test_a_budget_of_operations_gives_each_composition_its_steps(prepared, vlm, monkeypatch, tmp_path):
    monkeypatch.chdir(prepared)
    ran = launch_here(monkeypatch, pretends=True, counts=True)
    words = [*SETS, *TRAIN, "--output", tmp_path / "out", "--budget", "3.3 GFLOPs", "--json"]
    result = vlm("sweep", "base.yaml", *words)
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["compositions"]
    steps = [int(x[x.index("--max-steps") + 1]) for x in ran if x[0] == "train"]
    assert len(set(steps)) == 2
    for row, count in zip(rows, steps, strict=True):
        of_step = 2 * row["flops_per_record"]  # the records of a step
        assert count * of_step <= 3.3e9 < (count + 1) * of_step
    packed = vlm("sweep", "base.yaml", *words, "--pack", "64")
    assert packed.exit_code == 2
    assert "with --pack, nobody knows how many records a step has" in " ".join(packed.stderr.split())


@pytest.mark.matrix
def test_a_composition_that_cannot_learn_is_impossible(prepared, vlm, monkeypatch, tmp_path):
    monkeypatch.chdir(prepared)
    ran = launch_here(monkeypatch, pretends=True, counts=True)
    words = ["--set", "train.learning_rate=1e-3,{fusion: 1e-3}", *TRAIN, "--output", tmp_path / "out", "--json"]
    result = vlm("sweep", "base.yaml", *words)
    assert result.exit_code == 0, result.stderr
    even, uneven = json.loads(result.stdout)["compositions"]
    assert [x[0] for x in ran] == ["build", "train", "eval"]
    assert "scores" in even
    assert "fusion" in uneven["problem"]
