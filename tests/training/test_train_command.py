"""`vlm train`, from records to a directory that runs alone, and everything that can come between."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import Result

import vlm_cli.modeling.vlm
from tests.support import ROOT
from tests.support.command import start
from tests.support.grid import first_of
from tests.support.training import CROSS_ATTENTION, LANGUAGE_STREAM, interrupt_at, losses, metrics, write
from vlm_cli import load
from vlm_cli.checkpoint.saving import save
from vlm_cli.checkpoint.whole import check_files
from vlm_cli.training import output as output_module
from vlm_cli.training.checkpoints import Checkpoints, TrainingCheckpoint
from vlm_cli.training.dataset import Collator, load_dataset
from vlm_cli.training.identity import continue_history
from vlm_cli.training.job import Job
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.trainable import load_trainable
from vlm_cli.training.trainer import VLMTrainer

Vlm = Callable[..., Result]

STEPS = ("--batch-size", 6, "--log-every", 1, "--learning-rate", 3e-3)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def train(vlm: Vlm, folder: Path, cross_attention: Path, out: Path) -> Vlm:
    """Run `vlm train` on the cross-attention model."""

    def run(*arguments: Any, model: Path = cross_attention, data: str = "train.jsonl") -> Result:
        return vlm("train", model, "--data", folder / data, "--output", out, *STEPS, *arguments)

    return run


@pytest.mark.parametrize("batch_size", [1, 3])
def test_records_of_text_alone_train(train: Vlm, folder: Path, out: Path, batch_size: int) -> None:
    """The parts that train read images only, so a batch of text alone gives them no gradient."""
    write(folder / "text.jsonl", [{"text": "Words."}, {"prompt": "<image:red.png>A:", "completion": " red"}])
    flags = ("--max-steps", 4, "--batch-size", batch_size, "--eval-data", folder / "text.jsonl", "--save-every", 4)
    output(train(*flags, data="text.jsonl"))
    assert [entry["step"] for entry in metrics(out) if "eval_loss" in entry] == [4]
    assert all(loss > 0 for loss in losses(out).values()) and len(losses(out)) == 4


LOGS = (".jsonl", ".html")


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.with_name("out.checkpoints").glob("*") if path.suffix not in LOGS)


def output(result: Result) -> str:
    assert result.exit_code == 0, result.stderr + repr(result.exception)
    return result.stdout


def error(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.stderr + repr(result.exception)
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("fusion", first_of(["cross_attention", "language_stream"]))
def test_a_run_lowers_the_loss_and_writes_a_model(
    train: Vlm, vlm: Vlm, folder: Path, out: Path, fusion: str, request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    path = request.getfixturevalue(fusion)
    seen: dict[str, torch.Tensor] = {}
    run_from = VLMTrainer.run_from

    def keep_weights(self: VLMTrainer, checkpoint: Any) -> Any:
        outcome = run_from(self, checkpoint)
        seen.update({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return outcome

    monkeypatch.setattr(VLMTrainer, "run_from", keep_weights)
    report = json.loads(output(train("--max-steps", 15, "--json", model=path)))
    curve = losses(out)
    assert curve[15] < (0.9 if fusion == "cross_attention" else 0.7) * curve[1]  # the first LM is frozen, and random
    assert report["loss"] == curve[15] and report["steps"] == 15 and report["images"] == 90

    # The directory is what `vlm build` writes, and more.
    built = {file.name for file in path.iterdir()}
    assert {file.name for file in out.iterdir()} == built | {
        "metrics.jsonl",
        "loss.png",
        "run.html",
        "training_args.json",
    }
    for name in ("config.json", "composition.yaml", "processor_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (path / name).read_bytes()
    assert checkpoints(out) == [] and not out.with_name("out.checkpoints").exists()
    with Image.open(out / "loss.png") as image:
        assert image.size == (960, 540)

    # It holds what was trained, to the bit; only the declared parts changed.
    model, _ = load(str(out))
    torch.testing.assert_close(dict(model.state_dict()), seen, atol=0, rtol=0)
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    names = {"language_model": "lang_model"}
    trainable = {names.get(part, part) for part in model.config.composition.trainable}
    has_parameters = {name.split(".")[0] for name in before}
    assert changed == trainable & has_parameters

    answer = vlm("generate", "--model", out, "-i", folder / "red.png", "<image>Caption:", "--json")
    assert json.loads(output(answer))["new_tokens"] > 0


def test_what_the_terminal_shows(train: Vlm, out: Path) -> None:
    result = train("--max-steps", 2)
    lines = output(result).splitlines()
    assert lines[1].split() == ["Steps", "Records", "Images", "Loss", "Eval", "loss", "Images/s", "Time"]
    notes = result.stderr
    assert "Training vision_tokenizer, fusion, added_tokens (" in notes
    assert f"on 24 records for 2 steps of 6 records. Checkpoints in {out}.checkpoints" in notes
    assert "step 1/2  loss " in notes and " images/s  " in notes and " left" in notes
    assert notes.endswith(f'Wrote {out}. Next: vlm generate --model {out} --image FILE "…"\n')
    card = (out / "README.md").read_text()
    assert "2 steps on 24 records" in card and "untrained" not in card


def test_parts_and_weight_decay_are_chosen(train: Vlm, out: Path, cross_attention: Path) -> None:
    output(train("--max-steps", 2, "--trainable", "language-model", "--weight-decay", 0.3, "--optimizer", "muon"))
    before, after = load_file(cross_attention / "model.safetensors"), load_file(out / "model.safetensors")
    assert {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])} == {"lang_model"}
    parts = load(str(out))[0].config.composition
    assert parts.trainable == ("language_model",) and parts.weight_decay == 0.3


@pytest.mark.matrix
def test_parts_have_their_own_rates_also_when_the_run_is_resumed(
    train: Vlm, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = ("--lr", "1e-3,fusion=5e-3", "--schedule", "constant", "--warmup-steps", 0)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        result = train("--max-steps", 3, *rates)
        assert "Own rates: others 0.001, fusion 0.005." in result.stderr
        error(result, 130)
    message = error(train("--max-steps", 3, "--resume", "--lr", 1e-3), 2)
    assert "parts in --learning-rate: was ['fusion'], is None" in message
    output(train("--max-steps", 3, "--resume", *rates, "--lr", "1e-4,fusion=3e-3"))
    entries = {entry["step"]: entry for entry in metrics(out)}
    for step, others, fusion in ((2, 1e-3, 5e-3), (3, 1e-4, 3e-3)):
        assert entries[step]["learning_rate"] == fusion
        assert entries[step]["learning_rate/others"] == pytest.approx(others)
        assert entries[step]["learning_rate/fusion"] == fusion


@pytest.mark.matrix
def test_the_held_out_loss_is_the_mean_over_learned_tokens(train: Vlm, folder: Path, out: Path) -> None:
    output(train("--max-steps", 3, "--eval-data", folder / "train.jsonl", "--save-every", 2))
    values = {entry["step"]: entry["eval_loss"] for entry in metrics(out) if "eval_loss" in entry}
    assert list(values) == [2, 3]
    model, processor = load(str(out))
    data = load_dataset(folder / "train.jsonl", model, processor)
    batch = Collator(model.config.pad_token_id)([data[i] for i in range(len(data))])
    del batch["records"], batch["num_tokens"]
    with torch.no_grad():
        assert values[3] == pytest.approx(float(model(**batch).loss), rel=1e-5)


@pytest.mark.matrix
def test_accumulated_batches_are_one_batch(train: Vlm, out: Path) -> None:
    curves = []
    for settings in (("--batch-size", 8), ("--batch-size", 2, "--gradient-accumulation", 4)):
        output(train("--max-steps", 3, "--overwrite", *settings))
        curves.append(losses(out))
    assert curves[0] == pytest.approx(curves[1], abs=2e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "options", first_of([["--bf16", "--gradient-checkpointing"], ["--bf16"], ["--gradient-checkpointing"]])
)
def test_cheaper_arithmetic_learns_the_same(train: Vlm, out: Path, options: list[str]) -> None:
    curves = []
    for chosen in ([], options):
        output(train("--max-steps", 3, "--overwrite", *chosen))
        curves.append(losses(out))
    assert curves[0] == pytest.approx(curves[1], rel=0.02 if "--bf16" in options else 1e-5)


@pytest.mark.matrix
def test_half_precision_models_learn_in_float32(build: Any, train: Vlm, out: Path) -> None:
    path = build(CROSS_ATTENTION, dtype=torch.bfloat16)
    output(train("--max-steps", 6, "--bf16", "--lr", 1e-4, model=path))
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"vision_tokenizer", "fusion", "added_tokens"}
    output(train("--max-steps", 1, "--overwrite", "--dtype", "float16", model=path))
    assert load(str(out))[0].dtype == torch.float16


@pytest.mark.matrix
def test_a_run_ends_in_time(train: Vlm, out: Path) -> None:
    output(train("--max-minutes", 0.01, "--schedule", "linear"))
    last = metrics(out)[-1]
    assert 0.6 <= last["seconds"] < 6
    assert last["learning_rate"] < 1e-3  # of 3e-3: the schedule follows the time


# -- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_a_killed_run_resumes_as_if_nothing_had_happened(
    train: Vlm, folder: Path, cross_attention: Path, out: Path, tmp_path: Path
) -> None:
    options = ["--max-steps", 12, "--save-every", 3, "--eval-data", folder / "train.jsonl", "--optimizer", "muon"]
    output(train(*options))
    uninterrupted = losses(out)
    weights = load_file(out / "model.safetensors")
    out.rename(tmp_path / "first")
    process = start("train", cross_attention, "--data", folder / "train.jsonl", "--output", out, *STEPS, *options)
    mark = tmp_path / "out.checkpoints/checkpoint-6/complete.json"
    deadline = time.monotonic() + 60
    while process.is_alive() and not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert mark.exists() and not out.exists()
    # As if it had been killed while it wrote the next one.
    broken = mark.parents[1] / "checkpoint-11"
    broken.mkdir()
    result = train(*options, "--resume")
    assert f"Removed {broken}" in result.stderr
    report = metrics(out)
    assert [entry["step"] for entry in report if "loss" in entry] == list(range(1, 13))
    assert losses(out) == pytest.approx(uninterrupted, abs=1e-6)
    torch.testing.assert_close(load_file(out / "model.safetensors"), weights, atol=1e-6, rtol=1e-6)
    assert json.loads((out / "training_args.json").read_text())["result"]["resumed_from"] in (6, 9)
    report = check_files(out, verify=True)  # the manifest is that of the resumed run
    assert report is not None and report.hashed >= 5 and not report.unread and not report.edited


@pytest.mark.matrix
def test_ctrl_c_keeps_the_state(train: Vlm, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output(train("--max-steps", 6))
    uninterrupted = losses(out)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4)
        message = error(train("--max-steps", 6, "--overwrite"), 130)
    assert "Stopping after this step" in message
    assert (
        f"{out}.checkpoints/checkpoint-4 is kept. To continue from its step 4, repeat the command with --resume"
        in message
    )
    assert out.exists() and checkpoints(out) == ["checkpoint-4"]
    output(train("--max-steps", 6, "--overwrite", "--resume"))
    assert losses(out) == pytest.approx(uninterrupted, abs=1e-6)


@pytest.mark.matrix
def test_dropout_resumes_too(build: Any, train: Vlm, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = {
        "type": "qformer",
        "num_queries": 2,
        "depth": 2,
        "dim": 16,
        "num_heads": 2,
        "dim_ff": 16,
        "dropout": 0.5,
    }
    path = build(LANGUAGE_STREAM | {"vision_tokenizer": tokenizer})
    evaluate = ("--eval-data", path.parent / "held-out.jsonl", "--save-every", 2, "--overwrite")
    image = Image.new("RGB", (32, 32))
    image.save(path.parent / "black.png")
    write(path.parent / "held-out.jsonl", [{"text": "<image:black.png>black"}])
    curves = []
    for seed in (0, 1):
        output(train("--max-steps", 6, "--seed", seed, *evaluate, model=path))
        curves.append(losses(out))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 5, times=2)
        error(train("--max-steps", 6, "--seed", 1, *evaluate, model=path), 130)
    output(train("--max-steps", 6, "--seed", 1, *evaluate, "--resume", model=path))
    assert losses(out) == pytest.approx(curves[1], abs=1e-6)
    assert losses(out) != pytest.approx(curves[0], abs=1e-3)


@pytest.mark.matrix
def test_a_run_that_signals_end_equals_one_without_them_to_the_bit(
    build: Any, train: Vlm, folder: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals arrive at random steps: between entries of the log, and where a held-out loss is measured."""
    sizes = {"num_queries": 2, "depth": 1, "dim": 16, "num_heads": 2, "dim_ff": 16, "dropout": 0.5}
    path = build(LANGUAGE_STREAM | {"vision_tokenizer": {"type": "qformer", **sizes}})
    write(tmp_path / "held-out.jsonl", [{"text": f"<image:{folder}/red.png>red"}])
    options = ("--max-steps", 9, "--log-every", 4, "--save-every", 3, "--eval-data", tmp_path / "held-out.jsonl")

    def written() -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        # A resumed run counts the operations of its own first pass.
        varying = ("second", "memory", "flops", "utilisation")
        entries = [{k: x for k, x in e.items() if not any(word in k for word in varying)} for e in metrics(out)]
        return load_file(out / "model.safetensors"), entries

    output(train(*options, model=path))
    weights, entries = written()
    draw = random.Random(0)
    for steps in (3, 6), (9,), sorted(draw.sample(range(1, 9), 3)):
        flags = ["--overwrite"]
        for step in steps:
            with monkeypatch.context() as patched:
                interrupt_at(patched, step)
                message = error(train(*options, *flags, model=path), 130)
            assert message.endswith(f"step {step}, repeat the command with --resume.\n")
            flags = ["--overwrite", "--resume"]
        output(train(*options, *flags, model=path))
        resumed, resumed_entries = written()
        assert resumed_entries == entries, steps
        assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items()), steps


def test_ctrl_c_twice_stops_at_once(train: Vlm, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 4, times=2)
    message = error(train("--max-steps", 6, "--save-every", 2), 130)
    assert "checkpoint-2 is kept" in message and checkpoints(out) == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.matrix
def test_ctrl_c_before_the_first_checkpoint(train: Vlm, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 1, times=2)
    assert "Stopped before the first checkpoint; nothing was kept." in error(train("--max-steps", 6), 130)
    result = train("--max-steps", 6, "--resume")  # pressed again
    assert "No complete checkpoint in" in result.stderr


@pytest.fixture
def unfinished(train: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was interrupted at step 2."""
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        error(train("--max-steps", 5), 130)


@pytest.mark.matrix
@pytest.mark.usefixtures("unfinished")
def test_an_unfinished_run_is_not_forgotten_by_mistake(train: Vlm, out: Path) -> None:
    message = error(train("--max-steps", 5), 2)
    assert "holds an unfinished run, at step 2. Add --resume to continue it, or --overwrite to delete it" in message
    output(train("--max-steps", 3, "--overwrite", "--keep-checkpoints"))
    assert list(losses(out)) == [1, 2, 3] and checkpoints(out) == ["checkpoint-3"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("change", ["none", "kept", "other output"])
def test_checkpoints_of_a_run_that_was_killed_at_its_very_end(
    train: Vlm, out: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The output is in place, and the checkpoints are not removed yet: the next start removes them."""
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "remove", lambda self: None)  # as if killed before
        output(train("--max-steps", 2, *(["--keep-checkpoints"] if change == "kept" else [])))
    if change == "other output":
        (out / "training_args.json").write_text("{}")
    assert out.is_dir() and "checkpoint-2" in checkpoints(out)
    message = error(train("--max-steps", 2, "--resume"), code=2)
    assert f"{str(out)!r} exists" in message
    removed = f"Removed {out}.checkpoints: its run has written {out}." in message
    assert removed == (change == "none") == (not out.with_name("out.checkpoints").exists())


@pytest.mark.matrix
@pytest.mark.usefixtures("unfinished")
def test_another_run_is_not_resumed(train: Vlm, language_stream: Path) -> None:
    message = error(train("--max-steps", 5, "--resume", "--seed", 7, "--batch-size", 4), 2)
    assert "--seed: was 0, is 7" in message and "processes: was 6, is 4" in message and "MODEL" not in message
    assert "MODEL: was" in error(train("--max-steps", 5, "--resume", model=language_stream), 2)


@pytest.mark.matrix
@pytest.mark.usefixtures("unfinished")
def test_checkpoints_of_earlier_versions_resume(train: Vlm, folder: Path, out: Path, cross_attention: Path) -> None:
    """A checkpoint has the files and the manifest that the first version wrote, which read nothing else."""
    path = out.with_name("out.checkpoints") / "checkpoint-2"
    assert {file.name for file in path.iterdir()} == {
        *("complete.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")
    }
    manifest = json.loads((path / "complete.json").read_text())
    assert list(manifest) == ["step", "seconds", "images", "run"]
    weights = manifest["run"]["MODEL"].rsplit("(", 1)[1]
    data = manifest["run"]["--data"].rsplit("(", 1)[1]
    earlier = {
        "step": 2,
        "seconds": 0.4375,
        "images": 12,
        "run": {
            "MODEL": f"{cross_attention} ({weights}",
            "--data": f"24 records ({data}",
            "--batch-size × --gradient-accumulation × processes": 6,
            "--group-by-length": True,
            "--seed": 0,
            "--optimizer": "adamw",
            "--trainable": ["vision_tokenizer", "fusion", "added_tokens"],
        },
    }
    (path / "complete.json").write_text(json.dumps(earlier))
    result = train("--max-steps", 3, "--resume", "--json")
    assert json.loads(output(result))["resumed_from"] == 2
    assert list(losses(out)) == [1, 2, 3]


@pytest.mark.matrix
@pytest.mark.usefixtures("unfinished")
def test_what_may_change_is_changed_and_told(train: Vlm, out: Path) -> None:
    changed = ("--lr", 1e-5, "--schedule", "constant", "--warmup-steps", 0)
    result = train("--max-steps", 8, "--resume", *changed, "--save-every", 3)
    output(result)
    words = "from step 2 on, the run has --learning-rate 1e-05 (was 0.003), --schedule constant (was cosine), "
    assert words in result.stderr
    [change] = json.loads((out / "training_args.json").read_text())["changes"]
    assert change["step"] == 2 and change["--learning-rate"] == [3e-3, 1e-5]
    assert set(change) == {"step", "--learning-rate", "--schedule", "--warmup-steps", "--max-steps"}
    entries = {entry["step"]: entry for entry in metrics(out)}
    assert [entries[step]["learning_rate"] for step in range(3, 9)] == [1e-5] * 6


def test_a_run_that_is_resumed_as_it_was_has_no_changes(out: Path) -> None:
    history = continue_history(None, TrainingSettings(max_steps=5))
    history.changes.append({"step": 1, "--bf16": [False, True]})
    out.mkdir()
    (out / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {"RunHistory": history.state()}}))
    kept = TrainingCheckpoint(out, 2, 1.0, 4, {})
    assert continue_history(kept, TrainingSettings(max_steps=5)).changes == history.changes
    assert continue_history(kept, TrainingSettings(max_steps=6)).changes[1:] == [{"step": 2, "--max-steps": [5, 6]}]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frozen_weights_stay_in_half_precision_with_bf16(cross_attention: Path, out: Path, dtype: torch.dtype) -> None:
    model, processor = load(str(cross_attention))
    model.to(dtype).config.dtype = dtype
    save(model, processor, out, name="half")
    job = Job(model=str(out), data=out, output=out)
    kept, _, stored = load_trainable(job, TrainingSettings(bf16=True))
    assert stored == dtype and kept.lang_model.get_input_embeddings().weight.dtype == dtype
    assert all(p.dtype == torch.float32 for p in kept.parameters() if p.requires_grad)
    batch = processor(text="<image>A", images=Image.new("RGB", (8, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        kept.train()(**batch, use_cache=False).logits.float().sum().backward()
    other, _, _ = load_trainable(job, TrainingSettings())
    assert {p.dtype for p in other.parameters()} == {torch.float32}


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops(train: Vlm, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_of = vlm_cli.modeling.vlm.learned_loss
    calls = iter(range(1, 100))
    monkeypatch.setattr(
        vlm_cli.modeling.vlm,
        "learned_loss",
        lambda *args, **kwargs: loss_of(*args, **kwargs) * (torch.nan if next(calls) == 5 else 1),
    )
    message = error(train("--max-steps", 9, "--save-every", 2, "--batch-size", 2))
    assert re.search(r"Error: the loss is nan at step 5, in the records (('[\w-]+' \()?line \d+\)?(, )?){2}\.", message)
    assert f"The last good state is '{out}.checkpoints/checkpoint-4'; repeat the command with --resume" in message
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"] and not out.exists()
    kept = load_file(f"{out}.checkpoints/checkpoint-4/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_a_gradient_that_is_no_number_stops(train: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = VLMTrainer._clip_grad_norm
    monkeypatch.setattr(VLMTrainer, "_clip_grad_norm", lambda self, model: clip(self, model) * torch.inf)
    message = error(train("--max-steps", 2))
    assert "the gradient is inf at step 1" in message and "No checkpoint was written before it" in message


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.matrix
@pytest.mark.parametrize("module", first_of([safetensors.torch, torch]))
def test_a_disk_that_fills_leaves_the_last_checkpoint(
    train: Vlm, out: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "save_file" if module is safetensors.torch else "save"
    save = getattr(module, name)

    def fill(data: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            full_disk()
        return save(data, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, fill)
        message = error(train("--max-steps", 6, "--save-every", 2))
    assert "cannot write the checkpoint of step 4: No space left on device" in message
    assert f"The last complete one is '{out}.checkpoints/checkpoint-2'. Make room" in message
    assert checkpoints(out) == ["checkpoint-2"] and not out.exists()
    output(train("--max-steps", 6, "--save-every", 2, "--resume"))
    assert list(losses(out)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.matrix
def test_a_disk_that_fills_at_the_end(train: Vlm, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(output_module, "draw_losses", full_disk)
        message = error(train("--max-steps", 2))
    assert "No space left on device" in message and "repeat the command with --resume" in message
    assert not out.exists() and checkpoints(out) == ["checkpoint-2"]
    result = train("--max-steps", 2, "--resume")
    assert "step 1" not in result.stderr  # nothing is learned again
    assert list(losses(out)) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ({"--data": None}, 2, "no --data FILE.jsonl is given"),
        ({"--output": None}, 2, "no --output OUT is given"),
        ({"--data": "missing.jsonl"}, 1, "cannot find the records"),
        ({"MODEL": "flamingo"}, 2, "composition without weights"),
        ({"MODEL": "nowhere"}, 2, "unknown model 'nowhere'"),
        ({"--optimizer": "adam"}, 2, "unknown optimizer 'adam'. Did you mean 'adamw'? Known: adamw, muon."),
        ({"--schedule": "cosin"}, 2, "unknown schedule 'cosin'. Did you mean 'cosine'?"),
        ({"--batch-size": "0", "--learning-rate": "-1"}, 2, "--batch-size must be above 0, got 0."),
        ({"--batch-size": "0", "--learning-rate": "-1"}, 2, "--learning-rate must be above 0, got -1"),
        ({"--learning-rate": "nan"}, 2, "nan is no finite number"),
        ({"--max-steps": "-1"}, 2, "--max-steps must be above 0, got -1"),
        ({"--trainable": "visual"}, 2, "unknown part 'visual' in --trainable."),
        ({"--trainable": ""}, 2, "--trainable names no part"),
        ({"--stochastic-rounding": None}, 2, "Add --bf16, and leave out --optimizer"),
        ({"--compile": None}, 2, "the fusion puts blocks between them. Leave out --compile"),
        ({"--device": "cuda:1"}, 2, "unknown device 'cuda:1'. Known: auto, cpu. To choose one of several GPUs, set"),
        ({"--output": "no/such/out"}, 1, "the folder"),
    ],
)
def test_bad_options(
    vlm: Vlm, folder: Path, cross_attention: Path, out: Path, arguments: Any, code: int, words: str
) -> None:
    given = {"MODEL": str(cross_attention), "--data": str(folder / "train.jsonl"), "--output": str(out), **arguments}
    flat = [given.pop("MODEL")]
    for name, value in given.items():
        is_flag = name in ("--stochastic-rounding", "--compile")
        flat += [name] if is_flag else [] if value is None else [name, value]
    assert words in error(vlm("train", *flat), code)
    assert not out.exists() and checkpoints(out) == []


def test_bad_records_are_listed_before_anything_is_written(train: Vlm, folder: Path, out: Path) -> None:
    good = {"prompt": "<image:red.png>", "completion": "x"}
    long = {"prompt": "<image:red.png>", "completion": "word " * 3000}
    write(folder / "bad.jsonl", [good, {"text": ""}, long, {"text": "<image:none.png>x"}, good])
    message = error(train(data="bad.jsonl"))
    assert "Error: 3 of the 5 records in " in message
    for words in ('line 2: "text" is empty', "line 3: takes ", "line 4: cannot find 'none.png'"):
        assert words in message
    assert not out.with_name("out.checkpoints").exists()


def test_a_damaged_picture_stops_the_run(train: Vlm, folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "red.png").read_bytes()[:-30])
    write(folder / "cut.jsonl", [{"text": "<image:cut.png>x"}])
    for workers in (0, 1):
        message = error(train("--max-steps", 1, "--workers", workers, "--overwrite", data="cut.jsonl"))
        assert "line 1 of 'cut.jsonl': 'cut.png' is damaged or cut short" in message


@pytest.mark.matrix
def test_a_damaged_picture_takes_no_step_before_it(train: Vlm, folder: Path, out: Path) -> None:
    """The run stops, and goes on when the picture is mended, as if it had never stopped."""
    (folder / "mended.png").write_bytes((folder / "red.png").read_bytes())
    write(folder / "mended.jsonl", [{"text": f"<image:{name}.png>x"} for name in ("red", "red", "mended")])
    flags = ("--epochs", 2, "--batch-size", 1)
    whole = losses_of(train, out, *flags)
    (folder / "mended.png").write_bytes((folder / "red.png").read_bytes()[:-30])
    message = error(train(*flags, "--overwrite", data="mended.jsonl"))
    [kept] = checkpoints(out)
    assert f"{kept}' keeps the run at step {kept.split('-')[1]}. Mend the data, and repeat" in message
    (folder / "mended.png").write_bytes((folder / "red.png").read_bytes())
    assert losses_of(train, out, *flags, "--resume") == whole


def losses_of(train: Vlm, out: Path, *flags: Any) -> dict[int, float]:
    output(train(*flags, "--overwrite", data="mended.jsonl"))
    return losses(out)


def test_an_existing_output_is_kept(train: Vlm, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("x")
    assert "exists. Choose another name, or add --overwrite" in error(train(), 2)
    assert "is not a directory that vlm wrote" in error(train("--overwrite"), 2)
    assert (out / "mine.txt").read_text() == "x"


def test_a_space_before_the_border_is_noted(train: Vlm, folder: Path) -> None:
    write(folder / "border.jsonl", [{"prompt": "<image:red.png>A: ", "completion": "red"}])
    result = train("--max-steps", 1, data="border.jsonl")
    assert (
        "as in line 1 of border.jsonl, one token would hold the end of the prompt and the start of the completion"
        in result.stderr
    )


# -- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("module", ["torch.distributed.run", "accelerate.commands.launch"])
def test_two_processes_are_one_with_twice_the_batch(
    train: Vlm, folder: Path, cross_attention: Path, out: Path, tmp_path: Path, module: str
) -> None:
    options = [
        "--log-every",
        1,
        "--lr",
        3e-3,
        "--max-steps",
        8,
        "--save-every",
        4,
        "--eval-data",
        folder / "train.jsonl",
    ]
    output(train(*options, "--batch-size", 6))
    one = metrics(out)
    weights = load_file(out / "model.safetensors")
    out.rename(tmp_path / "one")
    # On a machine without GPUs, `--multi_gpu` is how Accelerate starts several processes without MPI.
    options_of_launcher = ["--nproc-per-node", 2] if "torch" in module else ["--multi_gpu", "--num_processes", 2]
    command = [sys.executable, "-m", module, *options_of_launcher, "-m", "vlm_cli", "train", cross_attention]
    command += ["--data", folder / "train.jsonl", "--output", out, *options, "--batch-size", 3]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = metrics(out)
    for key in ("loss", "eval_loss", "grad_norm"):
        curves = [{x["step"]: x[key] for x in entries if key in x} for entries in (one, two)]
        assert curves[0] == pytest.approx(curves[1], abs=2e-5, rel=2e-4 if key == "grad_norm" else 1e-5)
    assert [x["images"] for x in one if "loss" in x] == [x["images"] for x in two if "loss" in x]
    torch.testing.assert_close(load_file(out / "model.safetensors"), weights, atol=1e-4, rtol=1e-3)
    assert done.stderr.count("Training vision_tokenizer") == 1 and done.stdout.count("Images/s") == 1


@pytest.mark.matrix
def test_compiled_layers_give_the_losses_of_plain_ones(
    vlm: Vlm, folder: Path, language_stream: Path, tmp_path: Path
) -> None:
    words = ("train", language_stream, "--data", folder / "train.jsonl", "--max-steps", 4, "--log-every", 1)
    words += ("--lr", 3e-3, "--warmup-steps", 0, "--save-every", 2, "--eval-data", folder / "train.jsonl")
    for name, flags in {"plain": (), "compiled": ("--compile",)}.items():
        output(vlm(*words, "--output", tmp_path / name, *flags))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    other = load_file(tmp_path / "plain/model.safetensors")
    for name, x in load_file(tmp_path / "compiled/model.safetensors").items():
        torch.testing.assert_close(x, other[name], atol=1e-4, rtol=1e-3)


@pytest.mark.matrix
def test_weights_that_are_rounded_at_random_learn_and_resume_to_the_bit(
    vlm: Vlm, folder: Path, language_stream: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    words = ("train", language_stream, "--data", folder / "train.jsonl", "--max-steps", 4, "--log-every", 1)
    words += ("--bf16", "--lr", 3e-3, "--warmup-steps", 0, "--schedule", "linear", "--save-every", 2)
    output(vlm(*words, "--output", tmp_path / "plain"))
    output(vlm(*words, "--output", tmp_path / "whole", "--stochastic-rounding", "--keep-checkpoints"))
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "plain"), abs=0.2)
    saved = tmp_path / "whole.checkpoints/checkpoint-2"
    kept = load_file(saved / "model.safetensors")
    assert {x.dtype for name, x in kept.items() if name.endswith("proj.weight")} == {torch.bfloat16}
    shutil.copytree(tmp_path / "whole.checkpoints", tmp_path / "broken.checkpoints")
    shutil.rmtree(tmp_path / "broken.checkpoints/checkpoint-4")
    assert "--stochastic-rounding: was" in error(vlm(*words, "--output", tmp_path / "broken", "--resume"), 2)
    output(vlm(*words, "--output", tmp_path / "broken", "--stochastic-rounding", "--resume"))
    other = load_file(tmp_path / "broken/model.safetensors")
    assert all(torch.equal(x, other[name]) for name, x in load_file(tmp_path / "whole/model.safetensors").items())
