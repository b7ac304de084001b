"""`vlm train`."""

import contextlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.options import MAX_SEED, JsonOption, built_model, flatten_options
from vlm_cli.errors import UsageError

__all__ = ["train"]

DATA, LEARN, LENGTH, RUN = "Data", "Learning", "Length", "Run"


@dataclass(frozen=True)
class DataOptions:
    """Records and how they come in batches."""

    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Records to learn, JSONL.", rich_help_panel=DATA)
    ] = None
    eval_data: Annotated[
        Path | None,
        typer.Option(help="Records for the held-out loss, taken at each checkpoint.", rich_help_panel=DATA),
    ] = None
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Records at once.", rich_help_panel=DATA)] = 8
    gradient_accumulation: Annotated[int, typer.Option(help="Batches per step.", rich_help_panel=DATA)] = 1
    group_by_length: Annotated[
        bool, typer.Option(help="Records with as many images and tokens share a batch.", rich_help_panel=DATA)
    ] = True
    workers: Annotated[
        int | None, typer.Option(help="Processes that decode images; none on the CPU.", rich_help_panel=DATA)
    ] = None


@dataclass(frozen=True)
class LearningOptions:
    """What trains, and how."""

    trainable: Annotated[
        str | None,
        typer.Option(help="Comma-separated parts, instead of the composition's.", rich_help_panel=LEARN),
    ] = None
    optimizer: Annotated[
        str, typer.Option(help="adamw, or muon (for matrices; adamw for the rest).", rich_help_panel=LEARN)
    ] = "adamw"
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="At its highest.", rich_help_panel=LEARN)
    ] = 1e-4
    schedule: Annotated[str, typer.Option(help="How it falls: cosine, linear or constant.", rich_help_panel=LEARN)] = (
        "cosine"
    )
    warmup: Annotated[
        float, typer.Option(help="Steps over which it rises; below 1, share of the run.", rich_help_panel=LEARN)
    ] = 0.03
    weight_decay: Annotated[float | None, typer.Option(help="Instead of the composition's.", rich_help_panel=LEARN)] = (
        None
    )
    clip: Annotated[float, typer.Option(help="Most norm of a gradient; 0 does not clip.", rich_help_panel=LEARN)] = 1.0
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.", rich_help_panel=LEARN)] = False
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=LEARN)
    ] = False
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the order of records, and of dropout.", rich_help_panel=LEARN)
    ] = 0


@dataclass(frozen=True)
class LengthOptions:
    """When a run ends; the first bound that is reached counts."""

    epochs: Annotated[
        float | None, typer.Option(help="Times that each record is learned; 1 if nothing else ends the run.",
                                   rich_help_panel=LENGTH)
    ] = None  # fmt: skip
    max_steps: Annotated[int | None, typer.Option(help="Steps.", rich_help_panel=LENGTH)] = None
    max_minutes: Annotated[
        float | None, typer.Option(help="Minutes of training; the schedule follows them.", rich_help_panel=LENGTH)
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """Where a run takes place and what it keeps."""

    device: Annotated[str, typer.Option(help="auto or cpu.", rich_help_panel=RUN)] = "auto"
    dtype: Annotated[
        str,
        typer.Option(help="Of OUT's weights: auto (MODEL's), float32, bfloat16 or float16.", rich_help_panel=RUN),
    ] = "auto"
    save_every: Annotated[int, typer.Option(help="Steps from checkpoint to checkpoint.", rich_help_panel=RUN)] = 500
    log_every: Annotated[int, typer.Option(help="Steps from report to report.", rich_help_panel=RUN)] = 10


@dataclass(frozen=True)
class OutputOptions:
    """What may be replaced, gone on with, and left."""

    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last complete checkpoint.", rich_help_panel=RUN)
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if vlm wrote it; forget an unfinished run.",
                           rich_help_panel=RUN)
    ] = False  # fmt: skip
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Leave OUT.checkpoints at the end.", rich_help_panel=RUN)
    ] = False
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the language model's own code from the directory.",
                           rich_help_panel=RUN)
    ] = False  # fmt: skip


@flatten_options
def train(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Directory that `vlm build` wrote, or hub id.", show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory to write.")] = None,
    data: DataOptions = DataOptions(),
    learning: LearningOptions = LearningOptions(),
    length: LengthOptions = LengthOptions(),
    run: RunOptions = RunOptions(),
    outputs: OutputOptions = OutputOptions(),
    as_json: JsonOption = False,
) -> None:
    """Train a model on records of images and text; OUT appears when it is done.

    A record is a line such as {"prompt": "<image:cat.jpg>Caption:", "completion": " A cat."}

    Example: vlm train my-flamingo --data train.jsonl --output my-trained --max-steps 1000
    """  # fmt: skip
    for name, given in (("MODEL", model), ("--data FILE.jsonl", data.data), ("--output OUT", output)):
        if given is None:
            raise UsageError(f"no {name} is given: vlm train MODEL --data FILE.jsonl --output OUT")
    assert model is not None and data.data is not None and output is not None
    from vlm_cli.training.settings import Job, TrainingSettings

    values: dict[str, Any] = {**asdict(data), **asdict(learning), **asdict(length), **asdict(run)}
    files = {name: values.pop(name) for name in ("data", "eval_data")}
    job = Job(model=built_model(model), output=output, **files, **asdict(outputs))
    if learning.trainable is not None:
        names = [x.strip().replace("-", "_") for x in learning.trainable.split(",")]
        values["trainable"] = tuple(x for x in names if x)
    settings = TrainingSettings(**values)
    result = _run(job, settings)
    if result is None:
        return  # the first process speaks for all
    if as_json:
        console.print_json(result.to_dict())
    else:
        _print_result(result)
    console.notify(f'Wrote {output}. Next: vlm generate --model {output} --image FILE "…"')


def _run(job: Any, settings: Any) -> Any:
    import gc

    from vlm_cli.cli.models import silence_libraries
    from vlm_cli.training.run import Interrupted
    from vlm_cli.training.run import train as run_training

    silence_libraries()
    # `main` switched it off, for commands that end soon.
    gc.freeze()
    gc.enable()
    terminal = _listener()
    try:
        return run_training(job, settings, terminal)
    except Interrupted as error:
        terminal.notify(str(error))
        raise KeyboardInterrupt from None
    finally:
        terminal.leave_line()


def _listener() -> Any:
    """What shows a run on stderr."""
    from vlm_cli.training.run import Listener

    class Terminal(Listener):
        def __init__(self) -> None:
            self.shown = 0  # characters of the line that the next one overwrites
            self.under_way = contextlib.ExitStack()  # the step that began last

        def step(self, name: str) -> None:
            self.leave_line()
            self.under_way.close()
            if name:
                self.under_way.enter_context(console.step())(name)

        def notify(self, message: str) -> None:
            self.leave_line()
            console.notify(message)

        def progress(self, progress: Any) -> None:
            line = _progress_line(progress)
            if not sys.stderr.isatty() or progress.loss is None:
                self.notify(line)
                return
            print(f"\r{line:<{self.shown}}", end="", file=sys.stderr, flush=True)
            self.shown = len(line)

        def leave_line(self) -> None:
            if self.shown:
                print(file=sys.stderr, flush=True)
                self.shown = 0

        def card(self, model: Any, result: Any) -> str:
            return _card(model, result)

    return Terminal()


def _progress_line(progress: Any) -> str:
    """
    >>> from vlm_cli.training.trainer import Progress
    >>> _progress_line(Progress(20, 100, 1.5, None, 41.0, 95.0))
    'step 20/100  loss 1.5000  41.0 images/s  1:35 left'
    """
    total = "" if progress.total_steps is None else f"/{progress.total_steps}"
    if progress.loss is None:
        return f"step {progress.step}{total}  eval loss {progress.eval_loss:.4f}"
    return (
        f"step {progress.step}{total}  loss {progress.loss:.4f}  {progress.images_per_second:.1f} images/s  "
        f"{_duration(progress.seconds_left)} left"
    )


def _duration(seconds: float) -> str:
    """
    >>> _duration(3700)
    '1:01:40'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _print_result(result: Any) -> None:
    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.4f}"

    heads = ("Steps", "Records", "Images", "Loss", "Eval loss", "Images/s", "Time")
    row = (
        f"{result.steps:,}",
        f"{result.records:,}",
        f"{result.images:,}",
        number(result.loss),
        number(result.eval_loss),
        f"{result.images_per_second:.1f}",
        _duration(result.seconds),
    )
    console.print_table(heads, [row])


def _card(model: Any, result: Any) -> str:
    """A model card: what was built, and how it was trained."""
    from vlm_cli.cli.card import model_card

    trained = ", ".join(model.config.composition.trainable)
    held_out = "" if result.eval_loss is None else f", {result.eval_loss:.4f} on held-out records"
    loss = "unknown" if result.loss is None else f"{result.loss:.4f}"
    story = (
        f"Trained:\n{trained}, {result.steps:,} steps on {result.records:,} records.\n"
        f"Loss per token: {loss}{held_out};\nthe curve is in `loss.png`, the settings are in `training_args.json`."
    )
    return model_card(model, result.output.name, story)
