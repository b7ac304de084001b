"""`vlm train`."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlm_cli.cli import console
from vlm_cli.cli.command import option
from vlm_cli.cli.completion import complete_models
from vlm_cli.cli.loading import keep_collecting
from vlm_cli.cli.options import (
    BackboneOptions,
    ColumnsOption,
    ImageFolderOption,
    JsonOption,
    MaxPixelsOption,
    MediaRootOption,
    NoShimOption,
    QuietOption,
    VerifyOption,
    flatten_options,
)
from vlm_cli.cli.progress import format_duration
from vlm_cli.cli.spellings import accept_aliases
from vlm_cli.cli.terminal import is_terminal, keep_stdout, overwrite_line
from vlm_cli.data.inputs import is_pipe
from vlm_cli.data.mixture import Mixture, is_mixture_file
from vlm_cli.data.records import Reading
from vlm_cli.errors import UsageError
from vlm_cli.flags import Alias
from vlm_cli.models import resolve_built_model
from vlm_cli.printable import count_of
from vlm_cli.training.listener import Listener
from vlm_cli.training.settings import DATA, LEARNING, RUN, Job, TrainingSettings
from vlm_cli.training.stages import Stage, read_stages

if TYPE_CHECKING:
    from vlm_cli.evaluation.examiner import HeldOutExaminer
    from vlm_cli.report.examination import Examination
    from vlm_cli.training.outcome import StepReport, TrainingResult

__all__ = ["train"]

MOST_ANSWERS = 3  # that the log shows at each checkpoint
MAX_RECORDS = 1_000_000_000  # of a file


ModelOption = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Directory that `vlm build` wrote, or hub id.",
        show_default=False,
        autocompletion=complete_models,
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Write the trained model to the directory OUT.")
]
DataOption = Annotated[
    list[str] | None,
    option(
        DATA,
        "Learn the records of SOURCE: a file of JSON lines or JSON, Parquet, Arrow or tar files ('a/{000..012}.tar', "
        "'a/*.parquet'), a directory of them, hf:ORG/NAME[:CONFIG][:SPLIT], - for stdin, or a YAML file of several "
        "sources. Give it several times for several sources.",
        "--data",
        "-d",
        metavar="SOURCE",
    ),
]
WeightsOption = Annotated[
    str | None,
    option(
        DATA,
        "With several --data, draw the first source so often, the second so often, and so on: 2,1 draws twice as many "
        "records from the first. Without weights, a pass shows each record once.",
        metavar="X,…",
    ),
]
EvalDataOption = Annotated[
    Path | None,
    option(DATA, "Measure the loss on the records of SOURCE at each checkpoint.", metavar="SOURCE"),
]
StagesOption = Annotated[
    Path | None,
    option(
        DATA,
        "Train in the stages that FILE (YAML) describes, each with its own records, parts, rates and length. Other "
        "options hold for every stage.",
        metavar="FILE",
    ),
]
CacheFeaturesOption = Annotated[
    Path | None,
    option(
        DATA,
        "Keep what the frozen vision encoder gives for each picture in the folder DIR, so that it reads a picture once "
        "and not in each pass. vlm first tells how much that takes.",
        metavar="DIR",
    ),
]
EvalAnswersOption = Annotated[
    int | None,
    option(
        DATA,
        "Put the first N records of --eval-data to the model before the first step and at each checkpoint, as "
        "`vlm eval` does. The log and OUT/run.html show the answers.",
        min=1,
        max=MAX_RECORDS,
        metavar="N",
    ),
]
ResumeOption = Annotated[
    bool,
    option(RUN, "Continue an interrupted run from its last complete checkpoint.", "--resume"),
]
OverwriteOption = Annotated[
    bool,
    option(RUN, "Replace OUT if vlm wrote it, and delete the checkpoints of an unfinished run.", "--overwrite"),
]
KeepCheckpointsOption = Annotated[
    bool,
    option(RUN, "Keep OUT.checkpoints after the run has ended.", "--keep-checkpoints"),
]
MergeAdaptersOption = Annotated[
    bool,
    option(
        LEARNING,
        "If MODEL has adapters, add them to its weights before training. Without this option, they go on training.",
        "--merge-adapters",
    ),
]
ResumeFromOption = Annotated[
    str | None,
    option(RUN, "Same as --resume; the value is true, or OUT's last checkpoint.", metavar="PATH", hidden=True),
]
PushOption = Annotated[
    str | None,
    option(
        RUN,
        "Send OUT to the Hugging Face hub when training is done. vlm makes the repository before training begins.",
        metavar="ORG/NAME",
    ),
]
TrustOption = Annotated[
    bool,
    option(RUN, "Run the language model's own code from the directory of MODEL.", "--trust-remote-code"),
]


@flatten_options
def train(
    *,
    context: typer.Context,
    model: ModelOption = None,
    output: OutputOption = None,
    data: DataOption = None,
    weights: WeightsOption = None,
    eval_data: EvalDataOption = None,
    stages: StagesOption = None,
    columns: ColumnsOption = None,
    image_folder: ImageFolderOption = None,
    eval_answers: EvalAnswersOption = None,
    media_root: MediaRootOption = None,
    max_pixels: MaxPixelsOption = None,
    cache_features: CacheFeaturesOption = None,
    settings: TrainingSettings,
    resume: ResumeOption = False,
    resume_from_checkpoint: ResumeFromOption = None,
    overwrite: OverwriteOption = False,
    no_shim: NoShimOption = False,
    keep_checkpoints: KeepCheckpointsOption = False,
    push_to_hub: PushOption = None,
    trust_remote_code: TrustOption = False,
    merge_adapters: MergeAdaptersOption = False,
    verify: VerifyOption = False,
    places: BackboneOptions = BackboneOptions(),
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model on records of images and text. The directory OUT appears when training is done.

    A record is a line such as {"prompt": "<image:cat.jpg>Caption:", "completion": " A cat."}

    Example: vlm train my-flamingo --data train.jsonl --output my-trained --max-steps 1000
    """
    _check_given(model, data or None, eval_data, stages, output)
    assert model is not None and output is not None
    job = Job(
        model=resolve_built_model(model),
        data=_mix(data, weights) if data else Path(),  # each stage has its own
        output=output,
        eval_data=eval_data,
        eval_answers=eval_answers,
        resume=resume or _is_resumed(resume_from_checkpoint, output),
        overwrite=overwrite,
        shim=not no_shim,
        keep_checkpoints=keep_checkpoints,
        trust_remote_code=trust_remote_code,
        reading=Reading.of(media_root, max_pixels, image_folder, columns),
        backbones=places.backbones,
        allow_hosts=places.allow_hosts,
        verify=verify,
        merge_adapters=merge_adapters,
        cache_features=cache_features,
    )
    if eval_answers is not None:
        _check_questions(eval_data, stages)
    plan = None if stages is None else read_stages(stages, _given_settings(context, settings))
    results = _run(job, settings, plan, push_to_hub)
    if results is None:
        return  # only the first of several processes prints
    if as_json:
        last = results[-1].to_dict()
        names = [] if plan is None else [stage.name for stage in plan]
        told = [{"name": name, **result.to_dict()} for name, result in zip(names, results, strict=False)]
        console.print_json(last if plan is None else {**last, "stages": told})
    else:
        _print_results(results)
    console.notify(f'Wrote {output}. Next: vlm generate --model {output} --image FILE "…"')


accept_aliases(train, {Alias("--output-dir"): "--output", Alias("--hub-model-id"): "--push-to-hub"})


def _check_questions(eval_data: Path | None, stages: Path | None) -> None:
    """Refuse to ask questions that are not given, or can be read only once.

    Raises:
        UsageError: naming the options.
    """
    if eval_data is None and stages is None:
        raise UsageError("--eval-answers asks held-out records, and none are given. Add --eval-data FILE.")
    if eval_data is not None and is_pipe(eval_data):
        raise UsageError("--eval-answers reads --eval-data a second time, and a pipe is read once. Give a file.")


def _make_examiner(job: Job) -> HeldOutExaminer | None:
    """Make what asks the held-out questions of a job, or of a stage."""
    if job.eval_answers is None or job.eval_data is None:
        return None
    from vlm_cli.evaluation.examiner import HeldOutExaminer

    return HeldOutExaminer(job.eval_data, job.eval_answers, job.reading)


def _check_given(model: Any, data: Any, eval_data: Any, stages: Any, output: Any) -> None:
    """Check that the files of a run are named.

    Raises:
        UsageError: naming what is missing, or what a file of stages says itself.
    """
    for name, given in (("--data", data), ("--eval-data", eval_data)):
        if given is not None and stages is not None:
            raise UsageError(f"{name} cannot stand beside --stages: each stage in {str(stages)!r} names its records.")
    records = ("--data FILE.jsonl", data) if stages is None else ("--stages FILE.yaml", stages)
    for name, given in (("MODEL", model), records, ("--output OUT", output)):
        if given is None:
            raise UsageError(f"no {name} is given: vlm train MODEL {records[0]} --output OUT")


def _mix(data: Sequence[str], weights: str | None) -> Path | Mixture:
    """Return what --data and --weights say.

    Raises:
        UsageError: if the weights are no numbers, or do not fit the sources.
    """
    if weights is None and len(data) == 1 and not is_mixture_file(data[0]):
        return Path(data[0])
    try:
        numbers = None if weights is None else [float(x) for x in weights.split(",")]
    except ValueError:
        raise UsageError(f"--weights expects a number for each --data, such as 2,1, got {weights!r}.") from None
    return Mixture.of(data, numbers)


def _given_settings(context: typer.Context, settings: TrainingSettings) -> dict[str, Any]:
    """Return the settings that stand on the command line, which then hold for every stage."""
    sources = {name: context.get_parameter_source(name) for name in settings.to_dict()}
    return {
        name: getattr(settings, name) for name, source in sources.items() if source and source.name == "COMMANDLINE"
    }


def _is_resumed(checkpoint: str | None, output: Path) -> bool:
    """Read the value that Transformers' Trainer takes: true, false, or the path of a checkpoint.

    Raises:
        UsageError: if it is the path of anything but OUT's last checkpoint.
    """
    if checkpoint is None or checkpoint.lower() == "false":
        return False
    if checkpoint.lower() == "true":
        return True
    from vlm_cli.training.checkpoints import Checkpoints, checkpoint_folder

    last = Checkpoints(checkpoint_folder(output)).last()
    if last is None or last.path.resolve() != Path(checkpoint).resolve():
        known = "it has none" if last is None else f"that is {str(last.path)!r}"
        raise UsageError(
            f"--resume-from-checkpoint {checkpoint!r} is not the last checkpoint of {output}: {known}. vlm continues "
            "the run of OUT from its last checkpoint, with --resume. To start from trained weights, give them as MODEL."
        )
    return True


def _run(
    job: Job, settings: TrainingSettings, stages: Sequence[Stage] | None, repository: str | None
) -> list[TrainingResult] | None:
    """Train, and push the output to a repository of the hub if one is named."""
    terminal = _Terminal()
    try:
        terminal.step("starting")  # the libraries take seconds to load
        from vlm_cli.quiet import silence_libraries
        from vlm_cli.training.processes import is_first_process
        from vlm_cli.training.pushing import make_repository, push
        from vlm_cli.training.run import train_model
        from vlm_cli.training.staged import train_stages

        silence_libraries()
        keep_collecting()
        if repository is not None and is_first_process():
            make_repository(repository)
        with keep_stdout():  # from the programs to which a run reports
            if stages is not None:
                results = train_stages(job, stages, terminal, make_examiner=_make_examiner)
            else:
                result = train_model(job, settings, terminal, make_examiner=_make_examiner)
                results = None if result is None else [result]
        if repository is not None and results is not None:
            terminal.step(f"sending {job.output} to {repository}")
            push(job.output, repository)
            terminal.step("")
        return results
    finally:
        terminal.leave_line()


class _Terminal(Listener):
    """Shows a run on stderr: messages and losses on lines that stay, and the last step on one that it overwrites."""

    def __init__(self) -> None:
        self.last = ""  # what the last report says of the loss and the speed
        self.shown = False  # whether the cursor stands behind the progress line
        self.running_step = contextlib.ExitStack()  # the part of the preparation that began last

    def step(self, name: str) -> None:
        self.leave_line()
        self.running_step.close()
        if name:
            self.running_step.enter_context(console.announced_steps(console.is_quiet()))(name)

    def notify(self, message: str) -> None:
        self.leave_line()
        console.note(message)

    def progress(self, report: StepReport) -> None:
        self.notify(_format_report(report))
        for line in _format_answers(report.examination):
            self.notify(line)
        if report.loss is not None:
            self.last = f"  loss {report.loss:.4f}  {_format_speed(report)}"

    def step_done(self, step: int, total: int | None, seconds_left: float) -> None:
        """Show the number of the step until the next message; only a terminal can take the line back."""
        if is_terminal(sys.stderr) and not console.is_quiet():
            left = f", {_format_left(seconds_left)} left" if math.isfinite(seconds_left) else ""
            of = "" if total is None else f"/{total}"
            overwrite_line(f"  step {step}{of} done{self.last}{left}" if step else "  the first step …")
            self.shown = True

    def leave_line(self) -> None:
        """Take the progress line back, so that the next message stands in its place."""
        if self.shown:
            overwrite_line("", end="\r")
            self.shown = False


def _format_report(report: StepReport) -> str:
    """Write a report as one line.

    >>> from vlm_cli.training.outcome import StepReport
    >>> _format_report(StepReport(20, 100, 1.5, None, 41.0, 95.0, 0.4, 9.5e-05, 1.25))
    'step 20/100  loss 1.5000  epoch 0.4  lr 9.5e-05  grad 1.2  41 images/s  1:35 left'
    """
    total = "" if report.total_steps is None else f"/{report.total_steps}"
    if report.loss is None:
        found = report.examination
        right = "" if found is None else f"  {found.exact:,} of {count_of(len(found.answers), 'answer')} right"
        return f"step {report.step}{total}  eval loss {report.eval_loss:.4f}{right}"
    numbers = (("epoch", report.epoch, ".3g"), ("lr", report.learning_rate, ".2g"), ("grad", report.grad_norm, ".2g"))
    known = [f"{name} {value:{how}}" for name, value, how in numbers if value is not None]
    words = [f"step {report.step}{total}", f"loss {report.loss:.4f}", *known, _format_speed(report)]
    return "  ".join([*words, f"{_format_left(report.seconds_left)} left"])


def _format_speed(report: StepReport) -> str:
    speed = f"{report.images_per_second:.{0 if report.images_per_second >= 10 else 1}f} images/s"
    return speed if report.tokens_per_second is None else f"{speed}  {report.tokens_per_second:,.0f} tokens/s"


def _format_answers(found: Examination | None) -> list[str]:
    """Write the first answers to held-out questions, one line each.

    >>> from vlm_cli.report.examination import Examination, ExaminedAnswer
    >>> _format_answers(Examination([ExaminedAnswer("a", " a cat", False), ExaminedAnswer("b", " two", True)]))
    ["  wrong  a: 'a cat'", "  right  b: 'two'"]
    """
    return [
        f"  {'right' if x.exact else 'wrong'}  {x.id}: {x.answer.strip()[:100]!r}"
        for x in ([] if found is None else found.answers[:MOST_ANSWERS])
    ]


def _format_left(seconds: float) -> str:
    """Write a duration in few characters.

    >>> _format_left(95), _format_left(3725)
    ('1:35', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _print_results(results: Sequence[TrainingResult]) -> None:
    """Print a row for the run, or for each of its stages."""

    def format_loss(x: float | None) -> str:
        return "-" if x is None else f"{x:.4f}"

    heads = ("Steps", "Records", "Images", "Loss", "Eval loss", "Images/s", "Time")
    rows = [
        (
            f"{result.steps:,}",
            f"{result.records:,}",
            f"{result.images:,}",
            format_loss(result.loss),
            format_loss(result.eval_loss),
            f"{result.images_per_second:.1f}",
            format_duration(result.seconds),
        )
        for result in results
    ]
    console.print_table(heads, rows)
