"""Train a model: check the files, load, train, write."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import torch

from vlm_cli.checkpoint.directory import read_config
from vlm_cli.data.mixture import Mixture
from vlm_cli.errors import CheckpointError, OutputExistsError, TrainingError, UsageError
from vlm_cli.files import reserved_directory
from vlm_cli.interrupt import Interrupted, at_signal
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.training.announcing import announce, count_trained, tell_changes
from vlm_cli.training.best import BestWeights
from vlm_cli.training.checkpoints import Checkpoints, RunHistory, TrainingCheckpoint, checkpoint_folder
from vlm_cli.training.compiling import compile_layers
from vlm_cli.training.dataset import RecordDataset
from vlm_cli.training.features import check_cacheable
from vlm_cli.training.identity import check_same_run, continue_history, identify_run
from vlm_cli.training.job import Job
from vlm_cli.training.listener import Listener
from vlm_cli.training.metrics import METRICS_FILE
from vlm_cli.training.outcome import RunOutcome, TrainingResult
from vlm_cli.training.output import describe_run, digest_of_run, write_output
from vlm_cli.training.packing import check_packing
from vlm_cli.training.processes import Processes
from vlm_cli.training.reading import cache_features, make_writer, read_data
from vlm_cli.training.reporting import check_reporters
from vlm_cli.training.schedule import make_schedule
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.stream_opening import check_streamable
from vlm_cli.training.stream_state import read_stream_state
from vlm_cli.training.streaming import StreamedRecords
from vlm_cli.training.trainable import load_trainable, trains_on_cpu
from vlm_cli.training.trainer import VLMTrainer
from vlm_cli.training.watching import ANSWERS_FILE, PAGE_FILE, MakeExaminer, RunPage, Watching, make_no_examiner
from vlm_cli.writing.choice import TemplateChoice

__all__ = ["Run", "train_model"]


def train_model(
    job: Job,
    settings: TrainingSettings,
    listener: Listener | None = None,
    processes: Processes | None = None,
    *,
    make_examiner: MakeExaminer = make_no_examiner,
) -> TrainingResult | None:
    """Train a model on records, and write it as a directory that can be loaded without any other file.

    Args:
        job: the files that the run reads and writes.
        settings: how the model learns.
        listener: hears how the run goes.
        processes: those that share the run, if the caller has more work for them; None ends them after the run.
        make_examiner: makes what asks held-out questions at each checkpoint; None of it asks none.

    Returns:
        The result; None in all but the first of several processes.

    Raises:
        VLMError: for bad input, a full disk, or a loss that is not a number.
        Interrupted: after a signal; the text says what is kept.
    """
    shared = processes or Processes(trains_on_cpu(settings))
    try:
        return Run(job, settings, listener or Listener(), shared, make_examiner).execute()
    finally:
        if processes is None:
            shared.end()


class Run:
    """One call of `train_model`, in one of its processes."""

    def __init__(
        self,
        job: Job,
        settings: TrainingSettings,
        listener: Listener,
        processes: Processes,
        make_examiner: MakeExaminer = make_no_examiner,
    ) -> None:
        self.job, self.settings, self.processes = job, settings, processes
        self.examiner = make_examiner(job)
        self.use_cpu = trains_on_cpu(settings)
        self.listener = listener if self.processes.is_main else Listener()
        self.checkpoints = Checkpoints(checkpoint_folder(job.output))

    def execute(self) -> TrainingResult | None:
        self._check_inputs()
        self.processes.main_only(self._remove_finished)
        with ExitStack() as locks:
            # The lock of the output keeps its checkpoints, too; with several processes, the main one holds it.
            self.processes.main_only(lambda: locks.enter_context(self._reserve()))
            checkpoint = self.processes.main_first(self._prepare)
            try:
                with at_signal(self._describe_kept):
                    return self._execute(checkpoint)
            except KeyboardInterrupt as error:
                number = error.number if isinstance(error, Interrupted) else signal.SIGINT
                raise Interrupted(self._describe_kept(), number) from error
            except RuntimeError as error:
                if not self.processes.is_broken_by(error):
                    raise
                raise TrainingError(
                    f"another process of the run has ended, so this one cannot go on. {self._describe_kept()}"
                ) from error

    def check(self) -> None:
        """Check the settings and the records as `execute` does before it trains.

        Raises:
            VLMError: for bad input.
        """
        self._check_inputs()
        model, processor, _ = load_trainable(self.job, self.settings)
        self._read_data(model, processor)

    def _execute(self, checkpoint: TrainingCheckpoint | None) -> TrainingResult | None:
        self.listener.step(f"loading {self.job.model}")
        model, processor, stored = load_trainable(self.job, self.settings)
        if self.settings.pack is not None:
            check_packing(model, bf16=self.settings.bf16)
        if self.job.cache_features is not None:
            check_cacheable(model)
        if self.settings.compile:
            compile_layers(model, self.settings)
        self.listener.step(f"reading {self.job.mixture.describe()}")
        train_set, eval_set = self.processes.main_first(lambda: self._read_data(model, processor))
        if self.job.cache_features is not None and isinstance(train_set, RecordDataset):
            self.processes.main_first(lambda: self._cache_features(model, processor, [train_set, eval_set]))
        run = identify_run(self.job, self.settings, model, train_set, self.processes.count)
        if checkpoint is not None:
            self.processes.main_first(lambda: check_same_run(checkpoint, run))
            if isinstance(train_set, StreamedRecords):
                train_set.continue_from(read_stream_state(checkpoint.path, self.processes.rank))
        history = continue_history(checkpoint, self.settings)
        tell_changes(checkpoint, history, self.listener.notify)
        self.processes.main_only(lambda: self._make_folder(is_new=checkpoint is None))
        num_trained = count_trained(model)  # now, since FSDP leaves each process a share of the model
        watching = self._make_watching(model, processor, train_set)
        trainer = VLMTrainer(
            model,
            self.settings,
            train_set,
            eval_set,
            self.checkpoints,
            run=run,
            history=history,
            report=self.listener.progress,
            step_done=self.listener.step_done,
            notify=self.listener.notify,
            watching=watching,
            use_cpu=self.use_cpu,
        )
        self.listener.step("")
        announce(model, trainer, self.settings, self.processes.count, self.listener.notify)
        outcome = trainer.run_from(checkpoint)
        skipped = trainer.skipped_rows()
        for note in [*trainer.picture_notes.lines(), *([skipped.describe()] if skipped.count else [])]:
            self.listener.notify(note)
        result = replace(self._make_result(outcome, train_set, num_trained, checkpoint), skipped=skipped.count)
        return self.processes.main_only(lambda: self._finish(outcome, result, model, processor, stored, history))

    # -- before ---------------------------------------------------------------------------------------------------

    def _reserve(self) -> AbstractContextManager[bool]:
        """Keep other processes from writing the output and its checkpoints."""
        return reserved_directory(self.job.output, overwrite=self.job.overwrite)

    def _remove_finished(self) -> None:
        """Remove the checkpoints of a run that wrote its output and was killed before it could remove them."""
        if self.checkpoints.is_finished(digest_of_run(self.job.output)):
            self.checkpoints.remove()
            self.listener.notify(f"Removed {self.checkpoints.folder}: its run has written {self.job.output}.")

    def _check_inputs(self) -> None:
        """Refuse a schedule or a chat template that is none, and to read one stream of records twice.

        Raises:
            UsageError: naming the options.
        """
        make_schedule(self.settings)
        check_reporters(self.settings.report_to)
        TemplateChoice.parse(self.settings.chat_template)  # before anything is loaded
        self.settings.accumulation(self.processes.count)
        if self.settings.stochastic_rounding and self.processes.count > 1:
            raise UsageError(
                "--stochastic-rounding draws at random, so that the weights of several processes would drift apart. "
                "Train in one process, or leave it out: --bf16 alone keeps weights in float32."
            )
        if self.settings.streaming:
            check_streamable(self.job)
        if self.settings.best is not None and self.job.eval_data is None:
            raise UsageError("--best compares held-out records, and none are given. Add --eval-data FILE.")
        if self.settings.best == "score" and self.examiner is None:
            raise UsageError("--best score compares answers, and none are asked for. Add --eval-answers N.")
        evaluated = [] if self.job.eval_data is None else Mixture.of([self.job.eval_data]).pipes
        piped = [*self.job.mixture.pipes, *evaluated]
        if len(set(piped)) < len(piped):
            raise UsageError("--data and --eval-data are the same pipe, which can be read only once. Give two files.")
        if piped and self.processes.count > 1:
            raise UsageError(f"{self.processes.count} processes cannot share the pipe {str(piped[0])!r}. Give a file.")

    def _prepare(self) -> TrainingCheckpoint | None:
        """Check the model and the checkpoints of earlier runs, and return the checkpoint from which the run continues.

        Raises:
            VLMError: if another run's files are in the way, or MODEL is no model.
        """
        read_config(self.job.model, trust_remote_code=self.job.trust_remote_code)
        if self.job.resume:
            for path in self.checkpoints.clean():
                self.listener.notify(f"Removed {path}, which was not written to its end.")
            last = self.checkpoints.last()
            self.listener.notify(
                f"No complete checkpoint in {self.checkpoints.folder}; starting from the beginning."
                if last is None
                else f"Resuming from {last.path}."
            )
            return last
        if self.job.overwrite:
            self.checkpoints.remove()
        elif (last := self.checkpoints.last()) is not None:
            raise OutputExistsError(
                f"{str(self.checkpoints.folder)!r} holds an unfinished run, at step {last.step}. Add --resume to "
                "continue it, or --overwrite to delete it."
            )
        self.checkpoints.clean()
        return None

    def _read_data(
        self, model: VLM, processor: VLMProcessor
    ) -> tuple[RecordDataset | StreamedRecords, RecordDataset | None]:
        return read_data(self.job, self.settings, model, processor, self.processes, self.listener)

    def _cache_features(self, model: VLM, processor: VLMProcessor, sets: Sequence[RecordDataset | None]) -> None:
        assert self.job.cache_features is not None
        bf16, use_cpu = self.settings.bf16, self.use_cpu
        cache_features(
            self.job.cache_features, model, processor, sets, bf16=bf16, use_cpu=use_cpu, listener=self.listener
        )

    def _make_watching(self, model: VLM, processor: VLMProcessor, data: RecordDataset | StreamedRecords) -> Watching:
        """Make what measures and shows the run beside its losses, and check the held-out questions."""
        page = None
        if self.processes.is_main:
            facts = {
                "model": self.job.model,
                "trains": f"{', '.join(model.config.composition.trainable)} ({count_trained(model):,} parameters)",
                "records": data.describe_whole(),
            }
            page = RunPage(self.checkpoints.folder, f"Training {self.job.output.name}", facts, self.listener.notify)
        measure = self.settings.best
        best = None if measure is None else BestWeights(self.checkpoints.folder, measure)
        watching = Watching(page, self.examiner, best)
        watching.begin(model, processor, make_writer(self.settings, processor))
        return watching

    def _make_folder(self, *, is_new: bool) -> None:
        """Make the folder of checkpoints. A new run forgets what one without a checkpoint measured there."""
        try:
            self.checkpoints.folder.mkdir(exist_ok=True)
            if is_new:
                for name in (METRICS_FILE, ANSWERS_FILE, PAGE_FILE):
                    (self.checkpoints.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {str(self.checkpoints.folder)!r}: {error.strerror}.") from None

    # -- after ----------------------------------------------------------------------------------------------------

    def _make_result(
        self,
        outcome: RunOutcome,
        data: RecordDataset | StreamedRecords,
        num_trained: int,
        checkpoint: TrainingCheckpoint | None,
    ) -> TrainingResult:
        return TrainingResult(
            output=self.job.output,
            steps=outcome.steps,
            records=data.num_read if isinstance(data, StreamedRecords) else len(data),
            images=outcome.images,
            seconds=round(outcome.seconds, 2),
            loss=outcome.metrics.last("loss"),
            eval_loss=outcome.eval_loss,
            best_step=outcome.best_step,
            images_per_second=round(outcome.images / max(outcome.seconds, 1e-9), 2),
            trainable_parameters=num_trained,
            resumed_from=None if checkpoint is None else checkpoint.step,
            checkpoints=self.checkpoints.folder if self.job.keep_checkpoints else None,
        )

    def _finish(
        self,
        outcome: RunOutcome,
        result: TrainingResult,
        model: VLM,
        processor: VLMProcessor,
        stored: torch.dtype,
        history: RunHistory,
    ) -> TrainingResult:
        """Write the output in the main process, and remove the checkpoints unless the user keeps them."""
        self.listener.step(f"writing {self.job.output}")
        if outcome.gathered is not None:  # `model` holds only this process's share of the weights
            model, _, _ = load_trainable(self.job, self.settings)
            model.load_state_dict(outcome.gathered, strict=False)
        dtype = stored if self.settings.dtype == "auto" else getattr(torch, self.settings.dtype)
        model.to("cpu", dtype).eval()
        model.config.dtype = model.config.text_config.dtype = dtype
        run = describe_run(self.job, self.settings, result, num_processes=self.processes.count, use_cpu=self.use_cpu)
        run["changes"] = history.changes
        write_output(self.job, model, processor, outcome.metrics, result, run)
        if not self.job.keep_checkpoints:
            self.checkpoints.remove()
        self.listener.step("")
        return result

    def _describe_kept(self) -> str:
        last = self.checkpoints.last()
        if last is None:
            return "Stopped before the first checkpoint; nothing was kept."
        return f"{last.path} is kept. To continue from its step {last.step}, repeat the command with --resume."
