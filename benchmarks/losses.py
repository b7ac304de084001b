"""The losses of runs that compute the same in another way, beside those of a plain run, each with a spoiled run.

A plain run takes six steps of the same six records in one batch, one record a row, with all logits. Packing,
accumulation and the rest learn the same records in each step, so their losses must be the plain ones, the last after
five updates of the weights. Each has a twin, in which one thing is wrong: its difference is what a fault would show.

python -m benchmarks.losses             prints the table, and writes it into docs/recipes.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.processes import launch, run_script, write_models

FUSIONS = {"language-stream": "LANGUAGE_STREAM", "cross-attention": "CROSS_ATTENTION"}
MARK = "| compared with a plain run |"
STEPS, RECORDS, POSITIONS = 6, 6, 40
PLAIN: dict[str, Any] = {"batch_size": RECORDS}


# -- what is wrong in a twin -------------------------------------------------------------------------------------------


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Leave out something that the batches say."""
    from vlm_cli.training.trainer import VLMTrainer

    compute = VLMTrainer.compute_loss

    def compute_without(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        kept = {name: x for name, x in inputs.items() if name not in names}
        return compute(self, model, kept, *args, **kwargs)

    with patch.object(VLMTrainer, "compute_loss", compute_without):
        yield


@contextmanager
def own_means() -> Iterator[None]:
    """Give each batch the mean of its own losses, however many tokens it learns."""
    from vlm_cli.training.trainer import VLMTrainer

    draw = VLMTrainer.get_batch_samples

    def draw_uncounted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return draw(self, *args, **kwargs)[0], None

    with patch.object(VLMTrainer, "get_batch_samples", draw_uncounted):
        yield


@contextmanager
def cut_gradients() -> Iterator[None]:
    """Let no gradient leave a layer that is computed again, as older checkpointing lets none behind frozen inputs."""
    from vlm_cli.modeling.vlm import VLM

    checkpoint = VLM._checkpoint

    def checkpoint_cut(self: Any, recompute: Any, function: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self, recompute, function, hidden.detach(), *args, **kwargs)

    with patch.object(VLM, "_checkpoint", checkpoint_cut):
        yield


@contextmanager
def one_too_early() -> Iterator[None]:
    """Compute each logit one position too early."""
    from vlm_cli.modeling import vlm

    choose = vlm.chosen_positions
    with patch.object(vlm, "chosen_positions", lambda *args: choose(*args) - 1):
        yield


# -- what is compared --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is compared with a plain run.

    Attributes:
        name: as the table has it.
        settings: of `TrainingSettings`.
        wrong: what is wrong in the twin, as the table has it.
        spoil: does it, as long as its context is open.
        launcher: what starts two processes; None for one.
    """

    name: str
    settings: dict[str, Any]
    wrong: str
    spoil: Callable[[], AbstractContextManager[None]]
    launcher: str | None = None


CASES = (
    Case("logits at learned tokens alone", PLAIN, "each logit one position too early", one_too_early),
    Case(
        "packing: three records a row",
        {"batch_size": 2, "pack": 3 * POSITIONS},
        "the records of a row see each other",
        lambda: without("segments"),
    ),
    Case(
        "accumulation: three batches a step",
        {"batch_size": 2, "global_batch_size": RECORDS},
        "each batch has its own mean",
        own_means,
    ),
    Case(
        "gradient checkpointing",
        PLAIN | {"gradient_checkpointing": True},
        "no gradient leaves a layer",
        cut_gradients,
    ),
    Case("DDP: two processes", {"batch_size": RECORDS // 2}, "each process has its own mean", own_means, "DDP"),
    Case("FSDP2: two processes", {"batch_size": RECORDS // 2}, "each process has its own mean", own_means, "FSDP2"),
)


# -- runs --------------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Write the models, the pictures, and records of equally many positions and of other numbers of learned tokens."""
    import vlm_cli
    from tests.support import training
    from vlm_cli.training.dataset import load_dataset

    write_models(folder, FUSIONS.values())
    red, blue = ("<image:red.png>", "<image:blue.png>")
    forms = (
        (red, " red"),
        (f"{red}Q:", " A red square."),
        ("A word?", " yes"),
        (f"{blue}and{red}", " two"),
        ("", " Words without a picture."),
        (blue, " A blue square, and nothing else."),
    )
    tried = [{"prompt": f"Q{' a' * i}. {x}", "completion": y} for x, y in forms for i in range(POSITIONS)]
    # A picture takes four positions of a language stream, and one beside it, so each fusion has records of its own.
    for name in FUSIONS.values():
        model, processor = vlm_cli.load(str(folder / name))
        positions = load_dataset(training.write(folder / f"{name}.jsonl", tried), model, processor).positions
        fitting = [record for record, number in zip(tried, positions, strict=True) if number == POSITIONS]
        assert len(fitting) == RECORDS, f"{len(fitting)} records of {name} have {POSITIONS} positions"
        training.write(folder / f"{name}.jsonl", fitting)


def run(folder: Path, number: int | None, fusion: str, *, is_spoiled: bool, processes: Any = None) -> Path:
    """Train a case, or the plain run, in this process; return the folder that it wrote."""
    from vlm_cli.training.job import Job
    from vlm_cli.training.run import train_model
    from vlm_cli.training.settings import TrainingSettings

    case = None if number is None else CASES[number]
    settings = {"learning_rate": 3e-3, "max_steps": STEPS, "log_every": 1, "device": "cpu"}
    settings |= {"group_by_length": False, "warmup_steps": 0}  # each step has all records, and none is without effect
    settings |= PLAIN if case is None else case.settings
    name = FUSIONS[fusion]
    output = written(folder, number, fusion, is_spoiled)
    job = Job(model=str(folder / name), data=folder / f"{name}.jsonl", output=output)
    with without("logits_at") if case is None else case.spoil() if is_spoiled else nullcontext():
        train_model(job, TrainingSettings(**settings), processes=processes)
    return output


def written(folder: Path, number: int | None, fusion: str, is_spoiled: bool) -> Path:
    """Return where a run is written."""
    return folder / f"{'plain' if number is None else number}-{fusion}{'-twin' if is_spoiled else ''}"


def run_in_processes(folder: Path, launcher: str) -> None:
    """Train the cases of a launcher in this process, which is one of several."""
    from vlm_cli.training.processes import Processes

    processes = Processes(True)
    for number, case in enumerate(CASES):
        if case.launcher == launcher:
            for fusion in FUSIONS:
                for is_spoiled in (False, True):
                    run(folder, number, fusion, is_spoiled=is_spoiled, processes=processes)
    processes.end()


def compare(folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Return name of a case -> fusion -> largest difference of a loss from the plain run, and that of the twin."""
    from tests.support.training import losses

    prepare(folder)
    for launcher in sorted({case.launcher for case in CASES if case.launcher}):
        launch(folder, launcher, "benchmarks.losses")
    found: dict[str, dict[str, tuple[float, float]]] = {case.name: {} for case in CASES}
    for fusion in FUSIONS:
        plain = losses(run(folder, None, fusion, is_spoiled=False))
        for number, case in enumerate(CASES):
            if case.launcher is None:
                for is_spoiled in (False, True):
                    run(folder, number, fusion, is_spoiled=is_spoiled)
            right, wrong = (losses(written(folder, number, fusion, x)) for x in (False, True))
            found[case.name][fusion] = (_difference(plain, right), _difference(plain, wrong))
    return found


def _difference(plain: dict[int, float], other: dict[int, float]) -> float:
    assert plain.keys() == other.keys()
    return max(abs(plain[step] - other[step]) for step in plain)


def table(found: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Write the table."""
    rows = [f"{MARK} {' | '.join(FUSIONS)} | twin: what is wrong | {' | '.join(FUSIONS)} |"]
    rows += [f"|---|{'--:|' * len(FUSIONS)}---|{'--:|' * len(FUSIONS)}"]
    for case in CASES:
        pairs = found[case.name].values()
        right, wrong = (" | ".join(f"{pair[i]:.1e}" for pair in pairs) for i in range(2))
        rows.append(f"| {case.name} | {right} | {case.wrong} | {wrong} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    run_script(MARK, run_in_processes, lambda folder: table(compare(folder)))
