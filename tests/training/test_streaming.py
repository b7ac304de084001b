"""`vlm train --streaming`: the same rows and weights whatever comes between, and nothing left out in silence."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import Result

from tests.support.command import start
from tests.support.training import COLOURS, LANGUAGE_STREAM, write
from vlm_cli.data import stream as stream_module
from vlm_cli.training.trainer import VLMTrainer

Vlm = Callable[..., Result]

STEPS = ("--batch-size", 3, "--log-every", 1, "--learning-rate", 3e-3, "--shuffle-buffer", 8, "--streaming")
SIZES = {"num_queries": 2, "depth": 1, "dim": 16, "num_heads": 2, "dim_ff": 16, "dropout": 0.5}


@pytest.fixture(scope="module")
def model(build: Callable[..., Path]) -> Path:
    """With dropout, so that a random number too many shows in the weights."""
    return build(LANGUAGE_STREAM | {"vision_tokenizer": {"type": "qformer", **SIZES}})


@pytest.fixture(scope="module")
def mixture(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of 40 and 11 records, each with an id; the first has two files."""
    place = tmp_path_factory.mktemp("mixture")
    names = list(COLOURS)

    def records(source: str, count: int) -> list[dict[str, Any]]:
        words = [names[i % 4] for i in range(count)]
        return [
            {
                "prompt": f"<image:{folder}/{x}.png>{source}:",
                "completion": f" {x}" + " a" * (i % 5),
                "id": f"{source}{i}",
            }
            for i, x in enumerate(words)
        ]

    large = records("large", 40)
    (place / "large").mkdir()
    write(place / "large/0.jsonl", large[:25])
    write(place / "large/1.jsonl", large[25:])
    write(place / "small.jsonl", records("small", 11))
    path = place / "mixture.yaml"
    path.write_text("sources:\n  - {data: large, weight: 2}\n  - {data: small.jsonl, weight: 1}\n")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def train(vlm: Vlm, mixture: Path, model: Path, out: Path) -> Vlm:
    """Run `vlm train --streaming`."""

    def run(*arguments: Any, data: Path = mixture) -> Result:
        return vlm("train", model, "--data", data, "--output", out, *STEPS, *arguments)

    return run


@pytest.fixture(autouse=True)
def learned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], dict[int, list[str]]]:
    """Write down which records a step learns, also in copies of this process; of a step that is repeated, the last."""
    compute, path = VLMTrainer.compute_loss, tmp_path / "learned.jsonl"

    def note(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        names = [record.name.split("'")[1] for record in inputs["records"]]
        with path.open("a") as file:
            file.write(json.dumps([self.state.global_step + 1, names]) + "\n")
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "compute_loss", note)

    def read() -> dict[int, list[str]]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        found: dict[int, list[str]] = {}
        for step, batches in groupby(lines, key=lambda line: line[0]):
            found[step] = [name for _, names in batches for name in names]
        return found

    return read


def output(result: Result) -> str:
    assert result.exit_code == 0, result.stderr + repr(result.exception)
    return result.stdout


def error(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.stderr + repr(result.exception)
    assert "Traceback" not in result.stderr
    return result.stderr


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(second[name], tensor) for name, tensor in first.items())


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    compute = VLMTrainer.compute_loss

    def press(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "compute_loss", press)


@pytest.mark.parametrize(
    ("options", "interruptions"),
    [
        (["--max-steps", 4], [(2, 2)]),
        pytest.param(["--max-steps", 9, "--pack", 40], [(2, 2), (5, 0)], marks=pytest.mark.matrix),
        pytest.param(["--max-steps", 12, "--shuffle-buffer", 1], [(1, 1), (11, 3)], marks=pytest.mark.matrix),
    ],
)
def test_an_interrupted_stream_goes_on_to_the_bit(
    train: Vlm,
    out: Path,
    learned: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    options: list[Any],
    interruptions: list[tuple[int, int]],
) -> None:
    """With two sources, a shuffle buffer and dropout, and with another number of workers after each interruption."""
    options = ["--gradient-accumulation", 2, *options]
    output(train(*options))
    undisturbed, rows = weights(out), learned()
    flags = ["--overwrite"]
    for step, workers in interruptions:
        with monkeypatch.context() as patched:
            interrupt_at(patched, step)
            error(train(*options, *flags, "--workers", workers), 130)
        flags = ["--overwrite", "--resume"]
    output(train(*options, *flags, "--workers", 0))
    assert learned() == rows
    assert equal(weights(out), undisturbed)


def test_a_state_that_forgets_the_buffer_is_noticed(
    train: Vlm, out: Path, learned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the test above: a checkpoint whose buffer is empty, as other loaders write it."""
    output(train("--max-steps", 5))
    undisturbed, rows = weights(out), learned()
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        patched.setattr(stream_module, "_EVERY", 1)
        error(train("--max-steps", 5, "--overwrite"), 130)
    state = out.with_name("out.checkpoints") / "checkpoint-3/stream.json"
    data = json.loads(state.read_text())
    assert len(data["processes"][0]["stream"]["stream"]["buffer"]) == 7
    data["processes"][0]["stream"]["stream"]["buffer"] = []
    state.write_text(json.dumps(data))
    output(train("--max-steps", 5, "--overwrite", "--resume"))
    again = learned()
    assert again[3] == rows[3] and again != rows and not equal(weights(out), undisturbed)


@pytest.mark.matrix
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_stream_goes_on_to_the_bit(
    train: Vlm, mixture: Path, model: Path, out: Path, learned: Callable[..., Any], tmp_path: Path, workers: int
) -> None:
    """SIGKILL at three random steps; then the run continues with another number of workers."""
    options = ["--max-steps", 40, "--save-every", 3]
    output(train(*options, "--workers", workers))
    undisturbed, rows = weights(out), learned()
    out.rename(tmp_path / "first")
    draw = random.Random(workers)
    flags: list[Any] = []
    for step in sorted(draw.sample(range(4, 36), 3)):
        command = ("train", model, "--data", mixture, "--output", out, *STEPS, *options, *flags, "--workers", workers)
        process = start(*command)
        deadline = time.monotonic() + 120
        while process.is_alive() and last_step(tmp_path / "learned.jsonl") < step and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.join()
        assert not out.exists() and last_step(tmp_path / "learned.jsonl") >= step
        flags = ["--resume"]
    output(train(*options, "--resume", "--workers", 2 - workers))
    again = learned()
    assert again == rows and list(again) == list(range(1, 41))
    assert equal(weights(out), undisturbed)


def last_step(path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])[0]) if lines else 0
