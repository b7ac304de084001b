"""`vlm train`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlm_cli.cli import console
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
from vlm_cli.cli.spellings import accept_aliases
from vlm_cli.cli.terminal import keep_stdout
from vlm_cli.cli.training_log import TrainingLog, print_results
from vlm_cli.cli.training_options import (
    CacheFeaturesOption,
    DataOption,
    EvalAnswersOption,
    EvalDataOption,
    KeepCheckpointsOption,
    MergeAdaptersOption,
    ModelOption,
    OutputOption,
    OverwriteOption,
    PushOption,
    ResumeFromOption,
    ResumeOption,
    StagesOption,
    TrustOption,
    WeightsOption,
)
from vlm_cli.data.inputs import is_pipe
from vlm_cli.data.mixture import Mixture, is_mixture_file
from vlm_cli.data.records import Reading
from vlm_cli.errors import UsageError
from vlm_cli.flags import Alias
from vlm_cli.models import resolve_built_model
from vlm_cli.training.job import Job
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.stages import Stage, read_stages

if TYPE_CHECKING:
    from vlm_cli.evaluation.examiner import HeldOutExaminer
    from vlm_cli.publishing.repository import Repository
    from vlm_cli.training.outcome import TrainingResult

__all__ = ["train"]


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
        print_results(results)
    console.notify(f'Wrote {output}. Next: vlm generate --model {output} --image FILE "…"')


accept_aliases(train, {Alias("--output-dir"): "--output", Alias("--hub-model-id", beside_switch=True): "--push-to-hub"})


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
    terminal = TrainingLog()
    try:
        terminal.step("starting")  # the libraries take seconds to load
        from vlm_cli.quiet import silence_libraries
        from vlm_cli.training.processes import is_first_process
        from vlm_cli.training.run import train_model
        from vlm_cli.training.staged import train_stages

        silence_libraries()
        keep_collecting()
        opened = None
        if repository is not None and is_first_process():
            every = [settings] if stages is None else [stage.settings for stage in stages]
            opened = _open_repository(repository, job, every)
        with keep_stdout():  # from the programs to which a run reports
            if stages is not None:
                results = train_stages(job, stages, terminal, make_examiner=_make_examiner)
            else:
                result = train_model(job, settings, terminal, make_examiner=_make_examiner)
                results = None if result is None else [result]
        if opened is not None and results is not None:
            _push(job.output, opened, terminal)
        return results
    finally:
        terminal.leave_line()


def _open_repository(name: str, job: Job, settings: Sequence[TrainingSettings]) -> Repository:
    """Open a repository before the run, since only this shows that the user may write there.

    Raises:
        UsageError: if the user may not, or nobody else could use what the run would write.
    """
    from vlm_cli.publishing.fetchable import check_run
    from vlm_cli.publishing.repository import open_repository

    check_run(job, settings, name)
    return open_repository(name, option="--push-to-hub")


def _push(output: Path, repository: Repository, terminal: TrainingLog) -> None:
    """Send a model as `vlm push` does; its output stays if that fails."""
    from vlm_cli.publishing.push import PushOptions, push

    advice = f"{output} is written. Type: vlm push {shlex.quote(str(output))} {repository.name}"
    shipment, _ = push(output, repository, PushOptions(), advice=advice, progress=terminal.step)
    terminal.step("")
    for note in shipment.notes:
        console.note(f"Note: {note}")
