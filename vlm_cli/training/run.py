"""One run from files to a directory: check, load, train, write."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from vlm_cli.checkpoint.directory import load, read_config, save
from vlm_cli.composition import Composition
from vlm_cli.errors import CheckpointError, OutputExistsError, UsageError, VLMError
from vlm_cli.files import check_directory, replacing_directory
from vlm_cli.report.card import training_story
from vlm_cli.training.checkpoints import Checkpoint, Checkpoints, check_same_run, folder_of
from vlm_cli.training.dataset import RecordDataset, load_dataset
from vlm_cli.training.plot import draw_losses
from vlm_cli.training.settings import Job, TrainingSettings
from vlm_cli.training.trainer import METRICS_FILE, Progress, VLMTrainer
from vlm_cli.version import __version__

__all__ = ["Interrupted", "Listener", "Result", "train"]

_T = TypeVar("_T")


class Listener:
    """What a run tells; this one listens to nothing."""

    def step(self, name: str) -> None:
        """A part of the preparation begins."""

    def notify(self, message: str) -> None:
        """Something that the user should know."""

    def progress(self, progress: Progress) -> None:
        """A step was logged."""


@dataclass(frozen=True)
class Result:
    """What came out of a run."""

    output: Path
    steps: int
    records: int
    images: int  # seen, repeats included
    seconds: float  # of training
    loss: float | None  # last that was logged
    eval_loss: float | None
    images_per_second: float
    trainable_parameters: int
    resumed_from: int | None  # step
    checkpoints: Path | None  # where they were left

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "output": str(self.output), "checkpoints": self.checkpoints and str(self.checkpoints)}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says what was kept."""


def train(job: Job, settings: TrainingSettings, listener: Listener | None = None) -> Result | None:
    """Train a model on records and write it as a directory that runs alone.

    Args:
        job: the files.
        settings: how to learn.
        listener: is told how it goes.

    Returns:
        What came out; None in all but the first of several processes.

    Raises:
        VLMError: for bad input, a full disk, or a loss that is not a number.
        Interrupted: after Ctrl-C.
    """
    return _Run(job, settings, listener or Listener()).execute()


class _Run:
    """One call of `train`, in one of its processes."""

    def __init__(self, job: Job, settings: TrainingSettings, listener: Listener) -> None:
        self.job, self.settings = job, settings
        self.use_cpu = settings.device == "cpu" or not torch.accelerator.is_available()
        self.processes = _Processes(self.use_cpu)
        self.listener = listener if self.processes.is_main else Listener()
        self.checkpoints = Checkpoints(folder_of(job.output))

    def execute(self) -> Result | None:
        checkpoint = self.processes.main_first(self._prepare)
        try:
            result = self._execute(checkpoint)
            return result if self.processes.is_main else None
        except KeyboardInterrupt as error:
            raise Interrupted(self._what_was_kept()) from error
        finally:
            self.processes.end()

    def _execute(self, checkpoint: Checkpoint | None) -> Result:
        self.listener.step(f"loading {self.job.model}")
        model, processor, stored = self._load()
        self.listener.step(f"reading {self.job.data}")
        train_set, eval_set = self.processes.main_first(lambda: self._data(model, processor))
        run = self._identity(model, train_set)
        if checkpoint is not None:
            self.processes.main_first(lambda: check_same_run(checkpoint, run))
        self.processes.main_first(self._make_folder, main_only=True)
        trainer = VLMTrainer(
            model,
            self.settings,
            train_set,
            eval_set,
            self.checkpoints,
            run=run,
            report=self.listener.progress,
            notify=self.listener.notify,
            use_cpu=self.use_cpu,
        )
        self.listener.step("")
        self._announce(model, train_set, eval_set, trainer)
        trainer.run_from(checkpoint)
        if trainer.interrupted and not trainer.is_over(trainer.state.global_step, trainer.seconds):
            raise KeyboardInterrupt
        return self._write(trainer, processor, stored, checkpoint)

    # -- before ---------------------------------------------------------------------------------------------------

    def _prepare(self) -> Checkpoint | None:
        """Check where the run writes; the checkpoint that it goes on from.

        Raises:
            VLMError: if something is in the way, or MODEL is no model.
        """
        check_directory(self.job.output, overwrite=self.job.overwrite)
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
                f"{str(self.checkpoints.folder)!r} holds an unfinished run, at step {last.step}. Add --resume to go on "
                "with it, or --overwrite to forget it."
            )
        self.checkpoints.clean()
        return None

    def _load(self) -> tuple[Any, Any, torch.dtype]:
        """The model with its trainable parts in float32, its processor, and the dtype that its files have."""
        model, processor = load(self.job.model, trust_remote_code=self.job.trust_remote_code)
        stored = model.dtype
        keep = self.settings.bf16 and stored == torch.bfloat16
        composition = model.config.composition.to_dict()
        if self.settings.trainable is not None:
            composition["trainable"] = list(self.settings.trainable)
        if self.settings.weight_decay is not None:
            composition["weight_decay"] = self.settings.weight_decay
        model.config.composition = Composition.from_dict(composition)
        parts = model.config.composition.trainable
        if not parts:
            raise UsageError("nothing trains: the composition names no trainable part. Add --trainable PART,PART.")
        if not keep:
            model.float()
        model.set_trainable(parts)
        for name in parts:
            # Small steps would be lost in half precision.
            model.part_modules()[name].float()
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError(
                f"nothing trains: {', '.join(parts)} {'has' if len(parts) == 1 else 'have'} no parameters in this "
                "composition. Add another part: --trainable PART,PART."
            )
        return model, processor, stored

    def _data(self, model: Any, processor: Any) -> tuple[RecordDataset, RecordDataset | None]:
        files = [self.job.data, self.job.eval_data]
        sets = [None if path is None else load_dataset(path, model, processor) for path in files]
        for path, data in zip(files, sets, strict=True):
            if data is not None and data.shared:
                self.listener.notify(
                    f"Note: in {len(data.shared)} records of {path}, as in line {data.shared[0]}, the completion was "
                    "cut from a token that it shares with its prompt. A space between the two is best written at the "
                    "completion's beginning."
                )
        train_set, eval_set = sets
        assert train_set is not None
        return train_set, eval_set

    def _identity(self, model: Any, data: RecordDataset) -> dict[str, Any]:
        """What must be the same when a run goes on, in the words of the command line."""
        settings = self.settings
        return {
            "MODEL": f"{self.job.model} ({_digest(model)})",
            "--data": f"{len(data)} records ({data.sha256[:12]})",
            "--batch-size × --gradient-accumulation × processes": settings.step_size(self.processes.count),
            "--group-by-length": settings.group_by_length,
            "--seed": settings.seed,
            "--optimizer": settings.optimizer,
            "--trainable": list(model.config.composition.trainable),
        }

    def _make_folder(self) -> None:
        try:
            self.checkpoints.folder.mkdir(exist_ok=True)
            if not self.job.resume:
                (self.checkpoints.folder / METRICS_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write {str(self.checkpoints.folder)!r}: {error.strerror}.") from None

    def _announce(self, model: Any, data: RecordDataset, eval_set: RecordDataset | None, trainer: VLMTrainer) -> None:
        trained, total = _count(model, trained=True), _count(model, trained=False)
        steps, minutes = trainer.total_steps, self.settings.max_minutes
        bounds = [] if steps is None else [f"{steps} steps of {self.settings.step_size(self.processes.count)} records"]
        bounds += [] if minutes is None else [f"{minutes:g} minutes"]
        held_out = "" if eval_set is None else f" (and {len(eval_set)} held out)"
        self.listener.notify(
            f"Training {', '.join(model.config.composition.trainable)} ({trained:,} of {total:,} parameters) on "
            f"{len(data)} records{held_out} for {' or '.join(bounds)}. Checkpoints in {self.checkpoints.folder}"
        )

    # -- after ----------------------------------------------------------------------------------------------------

    def _write(self, trainer: VLMTrainer, processor: Any, stored: torch.dtype, checkpoint: Checkpoint | None) -> Result:
        model = self._whole_model(trainer)
        result = self._result(trainer, model, checkpoint)
        self.processes.main_first(lambda: self._write_output(model, processor, trainer, result, stored), main_only=True)
        return result

    def _whole_model(self, trainer: VLMTrainer) -> Any:
        """The trained model in one piece."""
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            return trainer.accelerator.unwrap_model(trainer.model)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # on the main process
        model, _, _ = self._load()
        if self.processes.is_main:
            model.load_state_dict(state, strict=False)
        return model

    def _write_output(
        self, model: Any, processor: Any, trainer: VLMTrainer, result: Result, stored: torch.dtype
    ) -> None:
        out = self.job.output
        self.listener.step(f"writing {out}")
        dtype = stored if self.settings.dtype == "auto" else getattr(torch, self.settings.dtype)
        model.to("cpu", dtype).eval()
        model.config.dtype = model.config.text_config.dtype = dtype
        try:
            with replacing_directory(out, overwrite=self.job.overwrite) as partial:
                story = training_story(
                    model, steps=result.steps, records=result.records, loss=result.loss, eval_loss=result.eval_loss
                )
                save(model, processor, partial, name=out.name, story=story)
                shutil.copy(trainer.metrics_path, partial / METRICS_FILE)
                draw_losses(trainer.history, partial / "loss.png", title=f"{out.name}: loss per token")
                (partial / "training_args.json").write_text(json.dumps(self._arguments(result), indent=2) + "\n")
        except VLMError as error:
            raise CheckpointError(
                f"{error} What was learned is in {str(self.checkpoints.folder)!r}: mend this, then repeat the command "
                "with --resume."
            ) from error
        if not self.job.keep_checkpoints:
            self.checkpoints.remove()
        self.listener.step("")

    def _result(self, trainer: VLMTrainer, model: Any, checkpoint: Checkpoint | None) -> Result:
        def last(key: str) -> float | None:
            return next((entry[key] for entry in reversed(trainer.history) if key in entry), None)

        return Result(
            output=self.job.output,
            steps=trainer.state.global_step,
            records=len(trainer.train_dataset),
            images=trainer.images,
            seconds=round(trainer.seconds, 2),
            loss=last("loss"),
            eval_loss=last("eval_loss"),
            images_per_second=round(trainer.images / max(trainer.seconds, 1e-9), 2),
            trainable_parameters=_count(model, trained=True),
            resumed_from=None if checkpoint is None else checkpoint.step,
            checkpoints=self.checkpoints.folder if self.job.keep_checkpoints else None,
        )

    def _arguments(self, result: Result) -> dict[str, Any]:
        from importlib.metadata import version

        names = ("torch", "transformers", "accelerate", "open_clip_torch")
        job = {key: str(x) if isinstance(x, Path) else x for key, x in vars(self.job).items()}
        return {
            "job": job,
            "settings": self.settings.to_dict(),
            "processes": self.processes.count,
            "threads": torch.get_num_threads(),
            "device": "cpu" if self.use_cpu else str(torch.accelerator.current_accelerator()),
            "versions": {"vlm_cli": __version__, **{name: version(name) for name in names}},
            "result": result.to_dict(),
        }

    def _what_was_kept(self) -> str:
        last = self.checkpoints.last()
        if last is None:
            return "Stopped before the first checkpoint; nothing was kept."
        return f"Stopped; {last.path} is kept. To go on from its step {last.step}, repeat the command with --resume."


class _Processes:
    """The processes that share a run, if `torchrun` or `accelerate launch` started more than one."""

    def __init__(self, use_cpu: bool) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        if self.count > 1:
            from accelerate import PartialState

            PartialState(cpu=use_cpu, backend="gloo" if use_cpu else None)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def main_first(self, action: Callable[[], _T], *, main_only: bool = False) -> _T:
        """What an action returns, done by the main process before the others.

        If it fails there, the others end without a word: one message is enough.
        """
        if self.count == 1:
            return action()
        failure = [0]
        result: Any = None
        error: VLMError | None = None
        if self.is_main:
            try:
                result = action()
            except VLMError as caught:
                error, failure = caught, [caught.exit_code]
        torch.distributed.broadcast_object_list(failure, src=0)
        if error is not None:
            raise error
        if failure[0]:
            raise SystemExit(failure[0])
        return result if self.is_main or main_only else action()

    def end(self) -> None:
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _count(model: Any, *, trained: bool) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def _digest(model: Any) -> str:
    """A few characters that tell models apart by their weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:4].tolist()}".encode())
    return digest.hexdigest()[:12]
