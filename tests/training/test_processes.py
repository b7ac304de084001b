"""Runs of two processes: their losses are those of one, they resume as one, and a process that dies ends the run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from typer.testing import Result

from benchmarks import processes
from tests.support import ROOT
from tests.support.markdown import table
from tests.support.training import losses
from vlm_cli.errors import TrainingError, UsageError
from vlm_cli.training import run as run_module
from vlm_cli.training.processes import Processes
from vlm_cli.training.sharding import blank_media, check_sharding

Vlm = Callable[..., Result]

# Records of similar sizes are grouped within the whole run, so that a shorter run has another order.
STEPS = (
    "--no-group-by-length",
    "--log-every",
    1,
    "--lr",
    3e-3,
    "--schedule",
    "constant",
    "--warmup-steps",
    0,
    "--save-every",
    2,
)


def start_several(*words: Any, sharding: dict[str, str] | None = None, count: int = 2) -> subprocess.Popen[str]:
    """Start `vlm` in several processes; with `sharding`, weights are spread over them."""
    module = "vlm_cli" if sharding is None else "tests.support.shard_on_cpus"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", module, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(sharding or {})}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def words(folder: Path, cross_attention: Path, tmp_path: Path) -> tuple[Any, ...]:
    return ("train", cross_attention, "--data", folder / "train.jsonl", *STEPS, "--output", tmp_path / "out")


@pytest.mark.matrix
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    found = processes.compare(tmp_path)
    assert list(found) == [case.name for case in processes.CASES]
    assert all(x < 1e-5 for values in found.values() for x in values.values()), found
    for number in range(len(processes.CASES)):
        wanted = processes.weights(tmp_path, "one", number)
        for launcher in processes.LAUNCHERS:
            torch.testing.assert_close(processes.weights(tmp_path, launcher, number), wanted, atol=1e-5, rtol=1e-4)
    # The same comparison sees another order of the records, or a loss that each process normalises by itself.
    one, other = processes.losses(tmp_path, "one", 0), processes.losses(tmp_path, "DDP", 1)
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-3


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_configurations(name: str, kind: str) -> None:
    config = load_config_from_file(str(ROOT / f"examples/recipes/accelerate/{name}.yaml"))
    assert str(config.distributed_type).endswith(kind) and config.num_processes == 8
    settings = dict(config.fsdp_config)
    assert settings.get("fsdp_version") == (2 if name == "fsdp2" else None)
    fields = {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
    aliases = {"auto_wrap_policy", "reshard_after_forward", "state_dict_type", "cpu_ram_efficient_loading"}
    known = fields | aliases | {"version", "offload_params", "activation_checkpointing"}
    assert {key.removeprefix("fsdp_") for key in settings} <= known


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "module"), [("ddp", "vlm_cli"), ("fsdp2", "tests.support.shard_on_cpus")])
def test_accelerate_starts_two_processes_with_the_configurations(
    vlm: Vlm, words: Any, tmp_path: Path, name: str, module: str
) -> None:
    whole = vlm(*words, "--max-steps", 2, "-b", 6)
    assert whole.exit_code == 0, whole.stderr
    weights, curve = load_file(tmp_path / "out/model.safetensors"), losses(tmp_path / "out")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / f"examples/recipes/accelerate/{name}.yaml"), "-m", module]
    command += [str(x) for x in (*words, "--max-steps", 2, "-b", 3, "--overwrite", "--device", "cpu")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/training_args.json").read_text())["processes"] == 2
    assert losses(tmp_path / "out") == pytest.approx(curve, abs=1e-5)
    torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors"), weights, atol=1e-4, rtol=1e-3)


def test_the_page_shows_each_comparison() -> None:
    rows = {row[0]: row[1:] for row in table(processes.PAGE.read_text(), "what trains")}
    assert list(rows) == [case.name for case in processes.CASES]
    assert all(float(x) < 1e-5 for row in rows.values() for x in row)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_run_of_two_processes_resumes_in_three(vlm: Vlm, words: Any, tmp_path: Path, kind: str) -> None:
    whole = vlm(*words, "--max-steps", 4, "-b", 6)
    assert whole.exit_code == 0, whole.stderr
    weights, curve = load_file(tmp_path / "out/model.safetensors"), losses(tmp_path / "out")
    sharding = processes.sharding("FSDP2") | {"FSDP_STATE_DICT_TYPE": kind}
    for count, steps, more in ((2, 2, ["--keep-checkpoints"]), (3, 4, ["--resume"])):
        sizes = ("--max-steps", steps, "--batch-size", 6 // count)
        process = start_several(*words, *sizes, "--overwrite", *more, sharding=sharding, count=count)
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
    assert "Resuming from" in stderr
    assert losses(tmp_path / "out") == pytest.approx(curve, abs=1e-5)
    torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors"), weights, atol=1e-4, rtol=1e-3)


@pytest.mark.matrix
@pytest.mark.parametrize("rank", [1, 0])
def test_a_process_that_is_killed_ends_the_run_and_another_number_of_processes_goes_on(
    vlm: Vlm, words: Any, tmp_path: Path, rank: int
) -> None:
    process = start_several(*words, "--max-steps", 4000, "-b", 3)
    mark = tmp_path / "out.checkpoints/checkpoint-2/complete.json"
    deadline = time.monotonic() + 120
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    [victim] = [x for x in psutil.Process(process.pid).children() if x.environ().get("RANK") == str(rank)]
    victim.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and not (tmp_path / "out").exists()
    assert "is kept. To continue from its step" in stderr
    assert "Error: another process of the run has ended" in stderr or "SIGTERM" in stderr
    [*_, last] = sorted((tmp_path / "out.checkpoints").glob("checkpoint-*"), key=lambda x: int(x.name[11:]))
    step = int(last.name[11:])
    resumed = vlm(*words, "--max-steps", step + 1, "-b", 6, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert list(losses(tmp_path / "out")) == list(range(1, step + 2))


def test_a_process_that_is_gone_is_explained(monkeypatch: pytest.MonkeyPatch, words: Any, vlm: Vlm) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:2021")

    monkeypatch.setattr(run_module.Run, "_execute", fail)
    alone = vlm(*words)
    assert alone.exit_code == 1 and "another process" not in alone.stderr  # there was none
    monkeypatch.setattr(Processes, "is_broken_by", lambda self, error: "closed by peer" in str(error))
    broken = vlm(*words)
    assert broken.exit_code == 1
    assert "Error: another process of the run has ended, so this one cannot go on. Stopped before" in broken.stderr
    assert issubclass(TrainingError, Exception)


def test_sharding_that_does_not_happen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_sharding(True)
    with pytest.raises(UsageError, match="Accelerate spreads weights over several accelerators only"):
        check_sharding(False)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("name", ["cross_attention", "language_stream"])
def test_media_that_nobody_sees_change_nothing_and_give_each_weight_a_gradient(
    request: pytest.FixtureRequest, name: str, encoded: bool
) -> None:
    from vlm_cli import load

    model: Any = load(str(request.getfixturevalue(name)))[0].train()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    blank = blank_media(model, 2, ids.device, encoded=encoded)
    losses = [model(input_ids=ids, labels=ids, use_cache=False, **media).loss for media in ({}, blank)]
    torch.testing.assert_close(*losses, atol=0, rtol=0)
    losses[1].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.grad.any() for p in model.vision_tokenizer.parameters())
