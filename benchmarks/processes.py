"""The losses of two processes beside those of one, over steps of the same records: DDP and FSDP2 on two CPU processes.

python -m benchmarks.processes             prints the table, and writes it into docs/recipes.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
MARK = "| what trains |"
STEPS = 6
LAUNCHERS = ("DDP", "FSDP2")


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        name: as the table has it.
        model: the composition, in `tests.support.training`; empty for what the case before it wrote.
        settings: of `TrainingSettings`.
        text: every other record is text alone.
        batches: number of batches of each process in a step.
        is_cached: the features of pictures are kept on the disk.
    """

    name: str
    model: str
    settings: dict[str, Any]
    text: bool = False
    batches: int = 1
    is_cached: bool = False


FULL = ("vision_tokenizer", "added_tokens", "language_model")
CASES = (
    Case("gated blocks, all else frozen", "CROSS_ATTENTION", {}),
    Case("the language model, whose head shares its table", "LANGUAGE_STREAM", {}),
    Case("… with gradient checkpointing", "LANGUAGE_STREAM", {"gradient_checkpointing": True}),
    Case("… in three batches for each step", "LANGUAGE_STREAM", {}, batches=3),
    Case("… with a rate and a decay per part", "LANGUAGE_STREAM", {"learning_rate": {"others": 1e-3, FULL[0]: 5e-3}}),
    Case("… half of the records text alone", "LANGUAGE_STREAM", {}, text=True),
    Case("gated blocks, half of the records text alone", "CROSS_ATTENTION", {}, text=True),
    Case("the vision encoder, too", "LANGUAGE_STREAM", {"trainable": ("vision_encoder", *FULL)}),
    Case("LoRA beside the projection", "LANGUAGE_STREAM", {"trainable": FULL[:1], "lora": ("language_model",)}),
    Case("… and another run of both", "", {"trainable": FULL[:1]}),
    Case("records packed into rows of 80 positions", "LANGUAGE_STREAM", {"pack": 80}),
    Case("gated blocks, records packed", "CROSS_ATTENTION", {"pack": 80}),
    Case("features of pictures kept on the disk", "LANGUAGE_STREAM", {}, is_cached=True),
)


def prepare(folder: Path) -> None:
    """Write the models, the pictures and the records."""
    from tests.support import training

    write_models(folder, {case.model for case in CASES} - {""})
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for record in records[::2]:
        record.clear()
        record.update(prompt="Q: A word? A:", completion=" yes")
    training.write(folder / "text.jsonl", records)


def write_models(folder: Path, names: Iterable[str]) -> None:
    """Write compositions of `tests.support.training` as models, and pictures and records for them."""
    import vlm_cli
    from examples import tiny_language_model
    from tests.support import training
    from vlm_cli.checkpoint.saving import save
    from vlm_cli.composition import Composition

    training.write_pictures_and_records(folder)
    (folder / "tower.json").write_text(json.dumps(training.TRAINING_TOWER))
    parts = {
        "vision_encoder": str(folder / "tower.json"),
        "language_model": str(tiny_language_model.make(folder / "lm")),
    }
    for name in sorted(names):
        blueprint = vlm_cli.plan(Composition.compose(None, parts, getattr(training, name)))
        (folder / name).mkdir()
        save(vlm_cli.create(blueprint), blueprint.processor, folder / name)


def run(folder: Path, launcher: str) -> None:
    """Train each case in this process, which may be one of several."""
    from vlm_cli.training.job import Job
    from vlm_cli.training.processes import Processes
    from vlm_cli.training.run import train_model
    from vlm_cli.training.settings import TrainingSettings

    processes = Processes(True)
    for number, case in enumerate(CASES):
        settings = {"learning_rate": 3e-3, "max_steps": STEPS, "log_every": 1, "device": "cpu", **case.settings}
        size = 6 // processes.count // (case.batches if processes.count > 1 else 1)
        settings |= {"batch_size": size, "global_batch_size": 6}
        data = folder / ("text.jsonl" if case.text else "train.jsonl")
        model = folder / (case.model or f"{launcher}-{number - 1}")
        features = folder / "features" if case.is_cached else None
        job = Job(model=str(model), data=data, output=folder / f"{launcher}-{number}", cache_features=features)
        train_model(job, TrainingSettings(**settings), processes=processes)
    processes.end()


def launch(folder: Path, launcher: str, module: str = "benchmarks.processes") -> None:
    """Start two processes that train each case of a module.

    Raises:
        RuntimeError: with what they wrote, if one failed.
    """
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", "localhost:0", "-m", module, launcher, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment | sharding(launcher), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])


def sharding(launcher: str) -> dict[str, str]:
    """Return what `accelerate launch` writes into the environment for FSDP2."""
    if launcher != "FSDP2":
        return {}
    chosen = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "STATE_DICT_TYPE": "FULL_STATE_DICT"}
    chosen |= {"RESHARD_AFTER_FORWARD": "true", "CPU_RAM_EFFICIENT_LOADING": "false"}
    return {"ACCELERATE_USE_FSDP": "true", **{f"FSDP_{name}": x for name, x in chosen.items()}}


def losses(folder: Path, launcher: str, number: int) -> list[float]:
    """Read the losses of a case."""
    lines = (folder / f"{launcher}-{number}" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def weights(folder: Path, launcher: str, number: int) -> dict[str, Any]:
    """Read the tensors that a case wrote, by file and name."""
    from safetensors.torch import load_file

    out = folder / f"{launcher}-{number}"
    files = sorted(out.rglob("*.safetensors"))
    return {f"{file.relative_to(out)} {name}": x for file in files for name, x in load_file(file).items()}


def compare(folder: Path) -> dict[str, dict[str, float]]:
    """Return name of a case -> launcher -> largest difference of a loss from that of one process."""
    prepare(folder)
    run(folder, "one")
    for launcher in LAUNCHERS:
        launch(folder, launcher)
    found: dict[str, dict[str, float]] = {}
    for number, case in enumerate(CASES):
        alone = losses(folder, "one", number)
        for launcher in LAUNCHERS:
            pairs = zip(alone, losses(folder, launcher, number), strict=True)
            found.setdefault(case.name, {})[launcher] = max(abs(a - b) for a, b in pairs)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Write the table."""
    rows = [f"{MARK} {' | '.join(LAUNCHERS)} |", f"|---|{'--:|' * len(LAUNCHERS)}"]
    rows += [f"| {name} | {' | '.join(f'{x:.1e}' for x in values.values())} |" for name, values in found.items()]
    return "\n".join(rows) + "\n"


def write_page(mark: str, text: str) -> None:
    """Write a table into docs/recipes.md, in the place of that which begins with `mark`."""
    before, found, rest = PAGE.read_text(encoding="utf-8").partition(mark)
    assert found, f"{PAGE} has no table that begins with {mark!r}"
    PAGE.write_text(f"{before}{text}\n{rest.partition(chr(10) * 2)[2]}", encoding="utf-8")


def run_script(mark: str, run: Callable[[Path, str], None], make_table: Callable[[Path], str]) -> None:
    """Be one of the processes of a launcher, or write the table that begins with `mark`.

    Args:
        mark: beginning of the table.
        run: what a process of a launcher does, with a folder and the launcher's name.
        make_table: measures in a folder.
    """
    if len(sys.argv) == 3:
        from tests.support.shard_on_cpus import shard

        with shard():
            run(Path(sys.argv[2]), sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        text = make_table(Path(folder))
    print(text, end="")
    write_page(mark, text)


if __name__ == "__main__":
    run_script(MARK, run, lambda folder: table(compare(folder)))
