"""Train a model in stages, one after the other: each begins with the model that the stage before it wrote.

    demo/                    the output, which appears at the end
    demo.checkpoints/        of the last stage
    demo.stages/
        1-align/             the model after the first stage; it appears when the stage is done
        2-instruct.checkpoints/

`--resume` skips the stages whose models are there, and continues the stage that was interrupted.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_cli.checkpoint.run_record import RUN_FILE
from vlm_cli.errors import CheckpointError, OutputExistsError, UsageError
from vlm_cli.files import check_directory
from vlm_cli.interrupt import Interrupted
from vlm_cli.plain_data import read_json
from vlm_cli.resume import settings_diff
from vlm_cli.training.checkpoints import Checkpoints
from vlm_cli.training.job import Job
from vlm_cli.training.listener import Listener
from vlm_cli.training.outcome import TrainingResult
from vlm_cli.training.output import digest_of_run
from vlm_cli.training.processes import Processes
from vlm_cli.training.run import Run, train_model
from vlm_cli.training.stages import Stage
from vlm_cli.training.trainable import trains_on_cpu
from vlm_cli.training.watching import MakeExaminer, make_no_examiner

__all__ = ["stages_folder", "train_stages"]


#: What of a stage's files must be as it was when the stage was done, as attributes of `Job`.
_SAME = ("model", "data", "eval_data", "image_folder", "media_root", "columns", "merge_adapters")


def stages_folder(out: Path) -> Path:
    """Return the folder that holds the models of the earlier stages of the run whose output is `out`."""
    return out.with_name(f"{out.name}.stages")


def train_stages(
    job: Job,
    stages: Sequence[Stage],
    listener: Listener | None = None,
    *,
    make_examiner: MakeExaminer = make_no_examiner,
) -> list[TrainingResult] | None:
    """Train a model in stages.

    Args:
        job: model, output and options of the whole run; each stage replaces its files of records.
        stages: at least one.
        listener: hears how the run goes.
        make_examiner: makes what asks the held-out questions of a stage.

    Returns:
        The result of each stage; None in all but the first of several processes.

    Raises:
        VLMError: as `train_model` does; also if the stages are others than those of an unfinished run.
        Interrupted: after a signal; the text says what is kept.
    """
    processes = Processes(trains_on_cpu(stages[0].settings))
    try:
        return _StagedRun(job, stages, listener or Listener(), processes, make_examiner).execute()
    finally:
        processes.end()


class _StagedRun:
    """One call of `train_stages`, in one of its processes."""

    def __init__(
        self,
        job: Job,
        stages: Sequence[Stage],
        listener: Listener,
        processes: Processes,
        make_examiner: MakeExaminer,
    ) -> None:
        self.make_examiner = make_examiner
        self.job, self.stages, self.processes = job, stages, processes
        self.listener = listener if processes.is_main else Listener()
        self.work = Checkpoints(stages_folder(job.output))

    def execute(self) -> list[TrainingResult] | None:
        self.processes.main_only(self._prepare)
        jobs = [self._make_job(number) for number in range(len(self.stages))]
        done = self.processes.main_first(lambda: self._count_done(jobs))
        self.processes.main_only(lambda: self._check(jobs, done))
        results: list[TrainingResult | None] = []
        for number, (job, stage) in enumerate(zip(jobs, self.stages, strict=True)):
            title = f"Stage {number + 1} of {len(self.stages)}, {stage.name}"
            if number < done:
                self.listener.notify(f"{title}: done before, in {job.output}.")
                results.append(_read_result(job.output))
                continue
            self.listener.notify(f"{title}:")
            results.append(self._train(number, job))
            gc.collect()  # Transformers' Trainer holds the model in circles of references
        if not self.job.keep_checkpoints:
            self.processes.main_only(self.work.remove)
        found = [result for result in results if result is not None]
        return found if self.processes.is_main else None

    def _train(self, number: int, job: Job) -> TrainingResult | None:
        try:
            settings = self.stages[number].settings
            return train_model(job, settings, self.listener, self.processes, make_examiner=self.make_examiner)
        except Interrupted as error:
            if number and "nothing was kept" in str(error):
                kept = f"The models of the earlier stages are in {self.work.folder}. To continue, repeat the command "
                raise Interrupted(f"{kept}with --resume.", error.number) from error
            raise

    def _make_job(self, number: int) -> Job:
        """Return the job of a stage: it reads the model of the stage before it."""
        stage, is_last = self.stages[number], number == len(self.stages) - 1
        reading = replace(self.job.reading, **stage.reading)
        job = replace(self.job, **stage.sources, reading=reading)  # type: ignore[arg-type]  # data and eval_data
        if number:
            job = replace(job, model=str(self._place(number - 1)), base=self.job.model)
        return replace(
            job,
            output=self.job.output if is_last else self._place(number),
            overwrite=self.job.overwrite and is_last,
            keep_checkpoints=self.job.keep_checkpoints and is_last,
            earlier=self.work.folder if is_last else None,
        )

    def _place(self, number: int) -> Path:
        return self.work.folder / f"{number + 1}-{self.stages[number].name}"

    def _prepare(self) -> None:
        """Make the folder of the stages' models, if no other run's files are in the way.

        Raises:
            VLMError: if they are.
        """
        folder, out = self.work.folder, self.job.output
        if self.work.is_finished(digest_of_run(out)):
            self.work.remove()
            self.listener.notify(f"Removed {folder}: its run has written {out}.")
        check_directory(out, overwrite=self.job.overwrite)
        if folder.exists() and not self.job.resume:
            if not self.job.overwrite:
                raise OutputExistsError(
                    f"{str(folder)!r} holds an unfinished run of stages. Add --resume to continue it, or --overwrite "
                    "to delete it."
                )
            self.work.remove()
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {str(folder)!r}: {error.strerror}.") from None

    def _count_done(self, jobs: Sequence[Job]) -> int:
        """Return how many stages are done, and check that they are those of this run.

        Raises:
            UsageError: if a stage was done with other settings.
        """
        for number, (job, stage) in enumerate(zip(jobs[:-1], self.stages, strict=False)):
            if not job.output.is_dir():
                return number
            record = _read_record(job.output)
            said = {key: x for key, x in job.to_dict().items() if key in _SAME}
            files = {key: x if x is None or isinstance(x, bool) else str(x) for key, x in said.items()}
            was = {**record["settings"], **{key: record["job"].get(key) for key in files}}
            was["merge_adapters"] = bool(was["merge_adapters"])  # a record of an earlier version has none
            now = {**stage.settings.to_dict(), **files}
            if differences := settings_diff(was, now):
                raise UsageError(
                    f"{str(job.output)!r} holds stage {stage.name!r} with other settings:\n{differences}\n"
                    "Give the same values again, or start a new run with --overwrite."
                )
        return len(self.stages) - 1

    def _adapters_of(self, done: int, stage: Stage) -> tuple[str, ...]:
        """Return the adapters that begin after the first stages that are done, and that a stage begins or goes on."""
        until = self.stages.index(stage) + 1
        return tuple(text for x in self.stages[done:until] for text in x.settings.lora or ())

    def _check(self, jobs: Sequence[Job], done: int) -> None:
        """Check the settings and records of the later stages now, not after hours of the first.

        Raises:
            VLMError: naming the stage.
        """
        for job, stage in list(zip(jobs, self.stages, strict=True))[done + 1 :]:
            self.listener.step(f"checking the records of stage {stage.name}")
            first = replace(job, model=jobs[done].model, base=jobs[done].base)
            settings = replace(stage.settings, lora=self._adapters_of(done, stage))
            Run(first, settings, Listener(), self.processes, self.make_examiner).check()
            gc.collect()
        self.listener.step("")


def _read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a stage that is done.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        record: dict[str, Any] = read_json(folder / RUN_FILE)
        return {"job": dict(record["job"]), "settings": dict(record["settings"]), "result": dict(record["result"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{str(folder)!r} has no whole {RUN_FILE}. Delete it to train this stage again, or start a new run with "
            "--overwrite."
        ) from None


def _read_result(folder: Path) -> TrainingResult:
    result = _read_record(folder)["result"]
    try:
        return TrainingResult(**{**result, "output": folder, "checkpoints": None})
    except TypeError:
        raise CheckpointError(f"{str(folder / RUN_FILE)!r} was written by another version of vlm.") from None
