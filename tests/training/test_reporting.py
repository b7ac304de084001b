"""What a run sends to TensorBoard, Weights & Biases and the hub, read back from their files and from a hub here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.support.hub_server import serving_here
from tests.support.training import metrics
from vlm_cli.training import reporting

Vlm = Callable[..., Result]


@pytest.fixture
def train(vlm: Vlm, folder: Path, cross_attention: Path, tmp_path: Path) -> Vlm:
    words = ("train", cross_attention, "--data", folder / "train.jsonl", "-b", 6, "--log-every", 1, "--max-steps", 2)
    return lambda *more: vlm(*words, "--output", tmp_path / "out", *more)


def logged(out: Path, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in metrics(out) if name in entry}


@pytest.mark.matrix
def test_tensorboard_gets_what_is_measured(train: Vlm, folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held_out = ("--eval-data", folder / "train.jsonl", "--save-every", 2)
    result = train("--report-to", "tensorboard", *held_out, "--lr", "1e-4,fusion=1e-3")
    assert result.exit_code == 0, result.stderr
    [file] = (tmp_path / "out/runs").rglob("events*")
    events = EventAccumulator(str(file))
    events.Reload()
    tags = {"train/loss": "loss", "eval/loss": "eval_loss", "train/learning_rate/fusion": "learning_rate/fusion"}
    tags |= {"train/images_per_second": "images_per_second", "train/grad_norm": "grad_norm"}
    for tag, name in tags.items():
        read = {event.step: event.value for event in events.Scalars(tag)}
        assert read == pytest.approx(logged(tmp_path / "out", name), rel=1e-6), tag


def records_of_wandb(data: bytes) -> Iterator[Any]:
    """Read the records of a `.wandb` file: 7 bytes of its own, then LevelDB's log format in blocks of 32 kB.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto import wandb_internal_pb2

    place, whole = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block that holds no header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<4xHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the end of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.matrix
def test_wandb_gets_what_is_measured_without_a_network(
    train: Vlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    result = train("--report_to", "wandb", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 2  # what wandb prints is on stderr
    [file] = tmp_path.rglob("*.wandb")
    read = {}
    for record in records_of_wandb(file.read_bytes()):
        row = {x.key or ".".join(x.nested_key): json.loads(x.value_json) for x in record.history.item}
        if "train/loss" in row:
            read[row["train/global_step"]] = row["train/loss"]
    assert read == pytest.approx(logged(tmp_path / "out", "loss"), rel=1e-6) and len(read) == 2


def test_a_program_that_is_not_installed(train: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "find_spec", lambda name: None)
    result = train("--report-to", "wandb")
    assert result.exit_code == 2
    assert "--report-to wandb needs the package wandb: pip install 'vlm-cli[wandb]'" in result.stderr
    assert "package wandb" not in train("--report-to", "none").stderr
    result = train("--report-to", "none,tensorboard")
    assert "unknown name 'none' in --report-to" in result.stderr
    result = train("--report-to", "tensorbord")
    assert "unknown name 'tensorbord' in --report-to. Did you mean 'tensorboard'?" in result.stderr


@pytest.mark.matrix
def test_a_trained_model_is_pushed_to_the_hub(train: Vlm, tmp_path: Path) -> None:
    with serving_here() as hub:
        result = train("--push-to-hub", "me/trained")
        assert result.exit_code == 0, result.stderr
        repository = hub.repositories["me/trained"]
        files = repository.commits[repository.names["main"]]
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(files) == written - {"training_args.json"}
    assert files["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
    assert "POST /api/repos/create" in hub.requests


def test_a_hub_that_takes_nothing_is_noticed_before_the_run(train: Vlm, tmp_path: Path) -> None:
    result = train("--push-to-hub", "me/trained")  # the tests run without a hub
    assert result.exit_code == 2 and "cannot push to 'me/trained': " in result.stderr
    assert "step 1" not in result.stderr and not (tmp_path / "out").exists()
    result = train("--push-to-hub", "no where")
    assert result.exit_code == 2 and "--push-to-hub expects ORG/NAME, got 'no where'." in result.stderr


def test_a_delta_that_nobody_else_could_use_is_refused_before_the_run(
    train: Vlm, tmp_path: Path, cross_attention: Path
) -> None:
    with serving_here() as hub:
        result = train("--push-to-hub", "me/trained", "--lora", "language_model:r=2")
        assert hub.requests == []
    assert result.exit_code == 2 and "step 1" not in result.stderr and not (tmp_path / "out").exists()
    assert "nobody else can fetch its vision encoder and language model from this machine" in result.stderr
    assert f"vlm push {cross_attention} ORG/NAME" in result.stderr
    assert f"vlm export {tmp_path / 'out'} OUT --format merged" in result.stderr


@pytest.mark.matrix
@pytest.mark.parametrize("value", ["true", "PATH", "elsewhere", "false"])
def test_the_trainer_s_way_to_resume(train: Vlm, tmp_path: Path, value: str) -> None:
    assert train("--keep-checkpoints").exit_code == 0
    last = tmp_path / "out.checkpoints/checkpoint-2"
    given = str(last) if value == "PATH" else value
    result = train("--resume_from_checkpoint", given, "--overwrite", "--max-steps", 3)
    if value == "elsewhere":
        assert result.exit_code == 2 and f"is not the last checkpoint of {tmp_path / 'out'}: that is" in result.stderr
    else:
        assert result.exit_code == 0, result.stderr
        assert ("Resuming from" in result.stderr) == (value != "false")
