"""Training in stages: what the file says, what each stage does, and how an interrupted run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import Result

from tests.support.training import interrupt_at, losses, write
from vlm_cli import load
from vlm_cli.errors import UsageError
from vlm_cli.training import staged
from vlm_cli.training.stages import read_stages

Vlm = Callable[..., Result]

SETTINGS = {"batch_size": 6, "log_every": 1, "learning_rate": 3e-3}
ALIGN = {"name": "align", "data": "train.jsonl", "trainable": ["vision_tokenizer"], "max_steps": 3}
TUNE = {
    "name": "tune",
    "data": "train.jsonl",
    "trainable": ["vision-tokenizer", "language-model"],
    "learning_rate": {"vision_tokenizer": 1e-3, "language_model": 2e-3},
    "max_steps": 2,
}


@pytest.fixture
def plan(folder: Path) -> Callable[..., Path]:
    """Write a file of stages beside the records."""

    def write_plan(*stages: dict[str, Any], **settings: Any) -> Path:
        path = folder / "stages.yaml"
        path.write_text(yaml.safe_dump({"settings": SETTINGS | settings, "stages": list(stages)}))
        return path

    return write_plan


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def changed(before: Path, after: Path) -> set[str]:
    """The parts whose weights differ."""
    one, two = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    return {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])}


def test_each_stage_trains_its_parts_from_where_the_one_before_ended(
    vlm: Vlm, plan: Any, language_stream: Path, out: Path, tmp_path: Path
) -> None:
    result = vlm(
        "train", language_stream, "--stages", plan(ALIGN, TUNE), "--output", out, "--keep-checkpoints", "--json"
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [stage["name"] for stage in report["stages"]] == ["align", "tune"] and report["steps"] == 2
    assert "Stage 1 of 2, align:" in result.stderr and "vision_tokenizer 0.001" in result.stderr
    first = tmp_path / "out.stages/1-align"
    assert changed(language_stream, first) == {"vision_tokenizer"}
    assert changed(first, out) == {"vision_tokenizer", "lang_model"}
    record = json.loads((out / "training_args.json").read_text())
    assert [stage["stage"] for stage in record["stages"]] == ["1-align"]
    assert record["stages"][0]["settings"]["max_steps"] == 3
    assert len((out / "metrics-1-align.jsonl").read_text().splitlines()) == 3

    # The same as two commands.
    for name, model, stage in (("one", language_stream, ALIGN), ("two", tmp_path / "one", TUNE)):
        rate = "1e-3,vision_tokenizer=1e-3,language_model=2e-3" if stage is TUNE else "3e-3"
        flags = ["--trainable", ",".join(stage["trainable"]), "--lr", rate, "--max-steps", stage["max_steps"]]
        data = plan().with_name("train.jsonl")
        done = vlm("train", model, "--data", data, "-o", tmp_path / name, "-b", 6, "--log-every", 1, *flags)
        assert done.exit_code == 0, done.stderr
    ours, theirs = load_file(out / "model.safetensors"), load_file(tmp_path / "two/model.safetensors")
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.matrix
@pytest.mark.parametrize("at", [(1, 2), (2, 1)])
def test_an_interrupted_run_goes_on_inside_its_stage(
    vlm: Vlm, plan: Any, language_stream: Path, out: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[int, int]
) -> None:
    words = ("train", language_stream, "--stages", plan(ALIGN, TUNE), "--output", out)
    whole = vlm(*words)
    assert whole.exit_code == 0, whole.stderr
    assert not out.with_name("out.stages").exists() and not out.with_name("out.checkpoints").exists()
    wanted, curve = load_file(out / "model.safetensors"), losses(out)
    stage, step = at
    shutil.rmtree(out)
    with monkeypatch.context() as patched:
        interrupt_at(patched, step, run=stage)
        stopped = vlm(*words)
    assert stopped.exit_code == 130 and "repeat the command with --resume" in stopped.stderr
    again = vlm(*words)
    assert again.exit_code == 2 and "holds an unfinished run of stages. Add --resume to continue it" in again.stderr
    other = vlm("train", language_stream, "--stages", plan(ALIGN | {"seed": 5}, TUNE), "-o", out, "--resume")
    assert other.exit_code == 2 and "seed: was 0, is 5" in other.stderr
    resumed = vlm("train", language_stream, "--stages", plan(ALIGN, TUNE), "-o", out, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert ("Stage 1 of 2, align: done before, in" in resumed.stderr) == (stage == 2)
    torch.testing.assert_close(load_file(out / "model.safetensors"), wanted, atol=0, rtol=0)
    assert losses(out) == curve


def test_a_fault_of_a_later_stage_is_found_before_the_first(
    vlm: Vlm, plan: Any, folder: Path, language_stream: Path, out: Path
) -> None:
    write(folder / "bad.jsonl", [{"prompt": "<image:missing.png>A", "completion": "b"}])
    result = vlm("train", language_stream, "--stages", plan(ALIGN, TUNE | {"data": "bad.jsonl"}), "--output", out)
    assert result.exit_code == 1 and "cannot find 'missing.png'" in result.stderr and "step 1" not in result.stderr
    assert not out.exists()


def test_a_stage_says_how_its_records_are_read(plan: Any, folder: Path) -> None:
    said = {"image_folder": "pictures", "media_root": "/safe", "columns": "prompt=q,completion=a"}
    [stage] = read_stages(plan(ALIGN | said))
    assert {key: str(x) for key, x in stage.reading.items()} == {
        "image_folder": str(folder / "pictures"),
        "media_root": "/safe",
        "columns": "prompt=q,completion=a",
    }
    found = [
        read_stages(plan(ALIGN | {"data": x}))[0].sources["data"] for x in ("train.jsonl", "hf:ORG/NAME", "a/b.jsonl")
    ]
    assert found == [folder / "train.jsonl", Path("hf:ORG/NAME"), folder / "a/b.jsonl"]


@pytest.mark.matrix
def test_a_stage_may_stream_its_records(vlm: Vlm, plan: Any, language_stream: Path, out: Path) -> None:
    short = {"max_steps": 1, "streaming": True, "group_by_length": False}
    result = vlm("train", language_stream, "--stages", plan(ALIGN | short, TUNE | short), "--output", out)
    assert result.exit_code == 0, result.stderr


def test_options_beside_the_file_hold_for_every_stage(plan: Any) -> None:
    path = plan(ALIGN, TUNE, bf16=True, chat_template="mine.jinja")
    (path.parent / "mine.jinja").write_text("{{ messages }}")
    align, tune = read_stages(path, {"max_steps": 9})
    assert align.settings.chat_template == str(path.parent / "mine.jinja")
    assert align.settings.max_steps == tune.settings.max_steps == 9
    assert align.settings.bf16 and align.settings.learning_rate == 3e-3
    assert tune.settings.trainable == ("vision_tokenizer", "language_model")
    [one, two] = read_stages(plan(ALIGN, {"name": "more", "data": "train.jsonl"}))
    assert two.settings.trainable == one.settings.trainable


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("stages: []", "stages must be a list of 1 to 20 values"),
        ("stages: [{name: a}]", "stages[0].data is missing"),
        ("stages: [{name: a/b, data: x}]", "stages[0].name must be a name of letters"),
        ("stages: [{name: a, data: x, lr: 1}]", "stage 'a' of the file of stages"),
        ("stages: [{name: a, data: x, learning_rat: 1}]", "Did you mean 'learning_rate'?"),
        ("stages: [{name: a, data: x, learning_rate: fast}]", "stages[0].learning_rate must be a number from 0"),
        ("stages: [{name: a, data: x, learning_rate: {fusio: 1}}]", "learning_rate.fusio is not known."),
        ("stages: [{name: a, data: x, batch_size: 0}]", "stage 'a' of the file of stages 'STAGES': --batch-size must"),
        ("stages: [{name: a, data: x, schedule: cosin}]", "stages[0].schedule must be one of cosine, linear"),
        ("stages: [{name: a, data: x}, {name: a, data: x}]", "has two stages of the name 'a'"),
        ("settings: {bf16: 1}\nstages: [{name: a, data: x}]", "settings.bf16 must be true or false"),
        ("stages: [{name: a, data: x}]\nsteps: 3", "has an unknown key 'steps'. Did you mean 'stages'?"),
        ("stages: {", "are not valid: line 1"),
        ("[]", "the content must be a mapping"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        read_stages(path)
    assert words.replace("STAGES", str(path)) in str(error.value)


def test_records_stand_in_the_file_alone(vlm: Vlm, plan: Any, language_stream: Path, out: Path) -> None:
    result = vlm("train", language_stream, "--stages", plan(ALIGN), "--data", "x", "--output", out)
    assert result.exit_code == 2 and "--data cannot stand beside --stages" in result.stderr
    result = vlm("train", language_stream, "--stages", "missing.yaml", "--output", out)
    assert result.exit_code == 2 and "cannot read the stages 'missing.yaml'" in result.stderr
    result = vlm("train", language_stream, "--stages", plan(ALIGN))
    assert "no --output OUT is given: vlm train MODEL --stages FILE.yaml --output OUT" in result.stderr


@pytest.mark.matrix
def test_the_folder_of_a_run_that_was_killed_at_its_very_end_goes(
    vlm: Vlm, plan: Any, language_stream: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", language_stream, "--stages", plan(ALIGN | {"max_steps": 1}, TUNE | {"max_steps": 1}), "-o", out)
    with monkeypatch.context() as patched:
        patched.setattr(staged.Checkpoints, "remove", lambda self: None)
        assert vlm(*words).exit_code == 0
    assert out.with_name("out.stages").is_dir()
    again = vlm(*words)
    assert again.exit_code == 2 and f"Removed {out}.stages: its run has written {out}." in again.stderr
    assert not out.with_name("out.stages").exists() and load(str(out))


def test_a_step_of_all_processes_has_the_wanted_size(vlm: Vlm, folder: Path, language_stream: Path, out: Path) -> None:
    words = ("train", language_stream, "--data", folder / "train.jsonl", "-o", out, "--max-steps", 1, "-b", 3)
    assert "of 12 records" in vlm(*words, "--global-batch-size", 12).stderr
    result = vlm(*words, "--global-batch-size", 8, "--overwrite")
    assert result.exit_code == 2
    assert "--global-batch-size 8 is no multiple of --batch-size × processes, 3 × 1" in result.stderr
