"""`vlm train --streaming`: the same rows and weights whatever comes between, and nothing left out in silence."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from typer.testing import Result

from tests.support import ROOT
from tests.support.command import start
from tests.support.hub_server import serving
from tests.support.training import COLOURS, LANGUAGE_STREAM, losses, write
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
        names = [getattr(record, "name", "'").split("'")[1] for record in inputs["records"]]
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


@pytest.mark.matrix
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


@pytest.mark.matrix
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


# -- what cannot be used -------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(folder: Path, tmp_path: Path) -> Path:
    """Twelve records, of which three cannot be used: no JSON, no such picture, and a picture without its end."""
    whole = (folder / "red.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) - 30])
    records: list[Any] = [
        {"prompt": f"<image:{folder}/red.png>", "completion": f" {i}", "id": f"good{i}"} for i in range(12)
    ]
    records[4] = {"prompt": "<image:gone.png>", "completion": " x"}
    records[7] = {"prompt": "<image:cut.png>", "completion": " x"}
    lines = [json.dumps(record) for record in records]
    lines[2] = "{"
    path = tmp_path / "spoilt.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_row_that_cannot_be_used_ends_the_run_or_is_named(
    train: Vlm, out: Path, spoilt: Path, learned: Callable[..., Any]
) -> None:
    options = ("--max-steps", 7, "--shuffle-buffer", 1, "--batch-size", 2)
    message = error(train(*options, data=spoilt))
    checkpoint = f"{out}.checkpoints/checkpoint-1"
    assert "line 3 of spoilt.jsonl: not JSON" in message
    assert f"{checkpoint!r} keeps the run at step 1. Mend the data, and repeat the command with --resume." in message
    assert learned() == {1: ["good0", "good1"]}
    result = train(*options, "--resume", "--bad-rows", "skip", "--workers", 1, "--json", data=spoilt)
    report = json.loads(output(result))
    assert report["records"] == 12 + 7 and report["skipped"] == 5  # lines 3 and 5 came twice
    notes = result.stderr
    assert "Skipped 5 rows that cannot be used, each time that they came:\n  line 3 of spoilt.jsonl: not JSON" in notes
    assert "  line 5 of spoilt.jsonl: " in notes and "gone.png" in notes and "  line 8 of spoilt.jsonl: " in notes
    names = [name for names in learned().values() for name in names]
    assert names == [f"good{i}" for i in (3, 5, 6, 8, 9, 10, 11, 0, 1, 3, 5, 6)]


@pytest.mark.matrix
def test_a_check_lists_what_cannot_be_used_before_the_first_step(train: Vlm, out: Path, spoilt: Path) -> None:
    """It decodes no picture, so the one without its end is found when its turn comes."""
    options = ("--epochs", 1, "--check", "--batch-size", 5)
    message = error(train(*options, data=spoilt))
    assert "2 of the 12 records in" in message and "  line 3: not JSON" in message and "  line 5: " in message
    assert not out.with_name("out.checkpoints").exists()
    result = train(*options, "--bad-rows", "skip", data=spoilt)
    output(result)
    assert "for 2 steps of 5 records" in result.stderr and "The run will skip them." in result.stderr


@pytest.mark.matrix
def test_a_file_that_disappears_leaves_a_checkpoint(
    train: Vlm, out: Path, mixture: Path, tmp_path: Path, learned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "mixture"
    shutil.copytree(mixture.parent, data)
    options = ("--max-steps", 9, "--shuffle-buffer", 2, "--batch-size", 6)
    compute = VLMTrainer.compute_loss

    def remove(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            (data / "small.jsonl").rename(data / "elsewhere")
        return compute(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(VLMTrainer, "compute_loss", remove)
        message = error(train(*options, data=data / "mixture.yaml"))
    before = learned()
    assert "small.jsonl" in message and f"checkpoint-{len(before)}' keeps the run at step {len(before)}." in message
    (data / "elsewhere").rename(data / "small.jsonl")
    output(train(*options, "--resume", data=data / "mixture.yaml"))
    assert [*before, *learned()] == list(range(1, 10))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--streaming never comes to an end by itself. Give --max-steps or --max-minutes."),
        (("--epochs", 2), "nobody counts the records of a pass"),
        (("--epochs", 2, "--check", "--pack", 90), "nobody knows how long a pass is"),
        (("--max-steps", 2, "--data", "/dev/stdin"), "is a pipe, which can be read once"),
        (("--max-steps", 2, "--cache-features", "kept"), "reads all pictures before the first step"),
    ],
)
def test_what_a_stream_cannot_do_is_said_at_once(train: Vlm, flags: tuple[Any, ...], words: str) -> None:
    data = {"data": Path(flags[-1])} if "--data" in flags else {}
    assert words in error(train(*(flags[:-2] if data else flags), **data), 2)


def test_a_buffer_needs_a_stream(vlm: Vlm, folder: Path, model: Path, out: Path) -> None:
    command = ("train", model, "--data", folder / "train.jsonl", "--output", out, "--shuffle-buffer", 5)
    assert "--shuffle-buffer has a meaning only with --streaming" in error(vlm(*command), 2)


def test_rows_are_left_out_without_a_stream_too(vlm: Vlm, model: Path, out: Path, spoilt: Path, folder: Path) -> None:
    command = ("train", model, "--data", spoilt, "--output", out, "--max-steps", 1, "--batch-size", 2)
    assert "2 of the 12 records in" in error(vlm(*command))
    (spoilt.parent / "cut.png").write_bytes((folder / "red.png").read_bytes())
    result = vlm(*command, "--bad-rows", "skip")
    output(result)
    assert "Skipped: 2 of the 12 records" in result.stderr and "on 10 records" in result.stderr


# -- several processes, and far away -------------------------------------------------------------------------------


def run_several(*words: Any, **environment: str) -> str:
    """Run `vlm` in two processes, and return what they note."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "vlm_cli", *words]
    own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(list(map(str, command)), env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.matrix
def test_two_processes_learn_the_rows_of_one(vlm: Vlm, mixture: Path, language_stream: Path, tmp_path: Path) -> None:
    """Also when they are resumed; another seed is seen to differ."""
    steady = ("--log-every", 1, "--lr", 3e-3, "--schedule", "constant", "--warmup-steps", 0, "--save-every", 2)
    stream = ("--data", mixture, "--streaming", "--shuffle-buffer", 8, *steady)
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    output(vlm("train", language_stream, *stream, "-b", 4, "--max-steps", 8, "--output", one))
    output(vlm("train", language_stream, *stream, "-b", 4, "--max-steps", 8, "--output", other, "--seed", 1))
    half = ("train", language_stream, *stream, "-b", 2, "--output", two)
    run_several(*half, "--max-steps", 4, "--keep-checkpoints", "--workers", 1)
    assert len(json.loads((tmp_path / "two.checkpoints/checkpoint-4/stream.json").read_text())["processes"]) == 2
    run_several(*half, "--max-steps", 8, "--resume", "--overwrite")
    assert losses(two) == pytest.approx(losses(one), abs=1e-5) and losses(other) != pytest.approx(losses(one), abs=1e-2)
    torch.testing.assert_close(weights(two), weights(one), atol=1e-4, rtol=1e-3)


@pytest.mark.matrix
def test_a_data_set_of_the_hub_is_downloaded_as_it_is_read(language_stream: Path, tmp_path: Path, folder: Path) -> None:
    """Of six files, a run of three steps fetches those of which it needs rows."""
    made = tmp_path / "made/data"
    made.mkdir(parents=True)
    picture = {"bytes": (folder / "red.png").read_bytes(), "path": "red.png"}
    for number in range(6):
        turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}]
        rows = [{"id": f"{number}-{i}", "messages": turns, "images": [picture]} for i in range(8)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), made / f"train-{number:05}-of-00006.parquet")
    with serving() as hub:
        hub.add("org/set", made.parent)
        own = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.address, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        words = ("train", language_stream, "--data", "hf:org/set", "--output", tmp_path / "out", "--streaming")
        words += ("--max-steps", 3, "-b", 2, "--shuffle-buffer", 4, "--workers", 1)
        command = [sys.executable, "-m", "vlm_cli", *map(str, words)]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        fetched = {x.rsplit("/", 1)[1] for x in hub.requests if x.startswith("GET") and x.endswith(".parquet")}
    assert 2 <= len(fetched) <= 3, hub.requests  # the first, by which the kind is recognised, and those of the stream
