"""Transformers' Trainer with the composition's parameter groups, whole checkpoints and one stream of batches.

Devices, processes, precision and sharding are Transformers' and Accelerate's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from vlm_cli.errors import CheckpointError, TrainingError
from vlm_cli.training.checkpoints import Checkpoint, Checkpoints
from vlm_cli.training.dataset import Collator, RecordDataset, check_batch, row_losses
from vlm_cli.training.optimizer import learning_rate_factor, make_optimizer
from vlm_cli.training.order import StreamSampler
from vlm_cli.training.settings import TrainingSettings

__all__ = ["METRICS_FILE", "Progress", "VLMTrainer"]

METRICS_FILE = "metrics.jsonl"
_UNBOUNDED = 10**9  # steps of a run that only its minutes bound
_ABSENT = object()
#: Of an entry of the metrics, in this order.
_KEYS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "images", "images_per_second", "seconds")


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int
    total_steps: int | None  # None: the run is bounded by time
    loss: float | None  # mean of the steps since the last report; None in a report of the held-out loss
    eval_loss: float | None
    images_per_second: float
    seconds_left: float


class VLMTrainer(Trainer):
    """Train a `VLM` on records.

    Args:
        model: a `VLM` whose trainable parts are set.
        settings: of the run.
        train_set: records to learn.
        eval_set: records for the held-out loss.
        checkpoints: where the state is kept.
        run: what must stay the same when a run is resumed.
        report: is told where the run stands.
        notify: is told what else the user should know.
        use_cpu: leave accelerators alone.
    """

    control: Any
    lr_scheduler: Any
    optimizer: Any

    def __init__(
        self,
        model: Any,
        settings: TrainingSettings,
        train_set: RecordDataset,
        eval_set: RecordDataset | None,
        checkpoints: Checkpoints,
        *,
        run: dict[str, Any],
        report: Callable[[Progress], None],
        notify: Callable[[str], None],
        use_cpu: bool,
    ) -> None:
        self.settings, self.checkpoints, self.run, self.report, self.notify = settings, checkpoints, run, report, notify
        self.metrics_path = checkpoints.folder / METRICS_FILE
        self.interrupted = False
        self.images = 0  # seen so far, earlier runs included
        self._clock = _Clock()
        self._images_reported, self._seconds_reported = 0, 0.0
        self._steps_before = 0  # of earlier runs
        self._unchecked: list[tuple[int, str, list[int], Tensor]] = []
        self._step_records: list[int] = []
        self._writing: Path | None = None
        arguments = _arguments(settings, checkpoints.folder, use_cpu=use_cpu, has_eval=eval_set is not None)
        # A tower's pooling and projection have no part in its patch features.
        arguments.ddp_find_unused_parameters = "vision_encoder" in model.config.composition.trainable
        total = settings.total_steps(len(train_set), arguments.world_size)
        arguments.max_steps = total or _UNBOUNDED
        use_cache = vars(model.config).get("use_cache", _ABSENT)
        super().__init__(
            model,
            arguments,
            data_collator=Collator(model.config.pad_token_id or 0),
            train_dataset=train_set,
            eval_dataset=eval_set,
            callbacks=[_Pace(self)],
        )
        # The base class writes its own choice into the configuration, and so into the output.
        vars(model.config).pop("use_cache", None)
        if use_cache is not _ABSENT:
            model.config.use_cache = use_cache
        self.remove_callback(PrinterCallback)

    # -- the run --------------------------------------------------------------------------------------------------

    def run_from(self, checkpoint: Checkpoint | None) -> None:
        """Train to the end, from the beginning or from a checkpoint.

        Raises:
            VLMError: if the loss is not a number, an image is damaged, or a checkpoint cannot be written.
        """
        if checkpoint is not None:
            self._clock.before, self.images = checkpoint.seconds, checkpoint.images
            self._steps_before = checkpoint.step
            self._images_reported, self._seconds_reported = checkpoint.images, checkpoint.seconds
            self._restore_metrics(checkpoint.path)
        if checkpoint is not None and self.is_over(checkpoint.step, checkpoint.seconds):
            self._load_from_checkpoint(str(checkpoint.path))
            self.state.global_step = checkpoint.step
            return
        deferred = _deferred_interrupt(self) if self.args.world_size == 1 else contextlib.nullcontext()
        with deferred:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))

    @property
    def history(self) -> list[dict[str, Any]]:
        """The entries of `metrics.jsonl`."""
        return self.state.log_history

    @property
    def seconds(self) -> float:
        """Of training, earlier runs included."""
        return self._clock.now

    @property
    def total_steps(self) -> int | None:
        return None if self.args.max_steps == _UNBOUNDED else self.args.max_steps

    def is_over(self, step: int, seconds: float) -> bool:
        budget = self.settings.max_minutes
        return step >= self.args.max_steps or (budget is not None and seconds >= 60 * budget)

    def progress(self, step: int) -> float:
        """Share of the run that is done: of its steps or its minutes, whichever ends it first."""
        budget = self.settings.max_minutes
        return max(step / self.args.max_steps, 0.0 if budget is None else self._clock.at_step / (60 * budget))

    def begin_step(self) -> None:
        """Take the time that all processes agree on for this step."""
        self._step_records = []
        self._clock.at_step = self._clock.now
        if self.settings.max_minutes is not None and self.args.world_size > 1:
            from accelerate.utils import broadcast

            self._clock.at_step = float(broadcast(torch.tensor(self._clock.now, device=self.args.device)))

    def ends_now(self, step: int) -> bool:
        return self.is_over(step, self._clock.at_step)

    def begin_training(self) -> None:
        self._clock.start()

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # a resumed state brings the intervals of its own run
        return result

    # -- optimizer ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            unwrapped = self.accelerator.unwrap_model(self.model if model is None else model)
            self.optimizer = make_optimizer(unwrapped, self.settings.optimizer, self.args.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(optimizer, lambda step: self._factor(step))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _factor(self, step: int) -> float:
        return learning_rate_factor(
            self.settings.schedule, step=step, progress=self.progress(step), warmup=self.settings.warmup_steps
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        wanted = [(group["initial_lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        # What the user says now counts, not what was said to the earlier run.
        self._clock.at_step = self._clock.before
        factor = self._factor(self.lr_scheduler.last_epoch)
        self.lr_scheduler.base_lrs = [rate for rate, _ in wanted]
        for group, (rate, decay) in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(initial_lr=rate, lr=rate * factor, weight_decay=decay)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, Tensor):
            self._watch("gradient", self._step_records, grad_norm)
        return grad_norm

    # -- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        size = self.settings.step_size(self.args.world_size)
        data = self.train_dataset
        sampler = StreamSampler(
            len(data),
            self.args.max_steps * size,
            seed=self.args.seed,
            batch_size=size,
            sizes=np.stack([data.num_images, data.lengths], axis=1) if self.settings.group_by_length else None,
        )
        return self._loader(data, sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        data = self.eval_dataset
        return self._loader(data, np.lexsort([data.lengths, data.num_images]).tolist())

    def _loader(self, data: RecordDataset, sampler: Any) -> DataLoader:
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            data,
            batch_size=self.args.per_device_train_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            worker_init_fn=_ignore_interrupt if workers else None,
            pin_memory=self.args.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        return super().get_batch_samples(map(check_batch, epoch_iterator), num_batches, device)

    # -- loss -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._attention():
            return super().training_step(*args, **kwargs)

    def _attention(self) -> Any:
        slow = self.args.bf16 and self.args.device.type == "cpu"
        return _float32_attention() if slow else contextlib.nullcontext()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        records = inputs.pop("records")
        result = super().compute_loss(
            model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch=num_items_in_batch
        )
        self.images += int(self.train_dataset.num_images[records].sum()) * self.args.world_size
        self._step_records = [*self._step_records, *records]
        self._watch("loss", records, (result[0] if return_outputs else result).detach())
        return result

    def _watch(self, what: str, records: list[int], value: Tensor) -> None:
        """Note a number that must be finite. An accelerator is asked only where it is waited for anyway."""
        self._unchecked.append((self.state.global_step + 1, what, records, value))
        if value.device.type == "cpu":
            self._check_finite()

    def _check_finite(self) -> None:
        """
        Raises:
            TrainingError: naming the first step and its records whose loss or gradient is not a number.
        """
        unchecked, self._unchecked = self._unchecked, []
        for step, what, records, value in unchecked:
            if not bool(torch.isfinite(value)):
                self._fail(step, what, records, float(value))

    def _fail(self, step: int, what: str, records: list[int], value: float) -> None:
        last = self.checkpoints.last()
        kept = (
            "No checkpoint was written before it; start again"
            if last is None
            else f"The last good state is {str(last.path)!r}; repeat the command with --resume"
        )
        raise TrainingError(
            f"the {what} is {value} at step {step}, in the records {self.train_dataset.describe(records)}. {kept} and "
            "a lower --learning-rate or --max-grad-norm, or without --bf16, or mend the records."
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The base class counts the parameters anew at each step.
        return 0

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss of the learned tokens of the held-out records."""
        self._check_finite()
        model = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        for batch in map(check_batch, self.get_eval_dataloader()):
            inputs = self._prepare_inputs(batch)
            inputs.pop("records")
            labels = inputs.pop("labels")
            with self._attention():
                rows = row_losses(model(**inputs, use_cache=False).logits, labels)
            # Rows that were repeated to fill the last batch are left out.
            losses, counts = self.accelerator.gather_for_metrics(rows)
            totals += torch.stack([losses.double().sum(), counts.double().sum()]).cpu()
        metrics = {"eval_loss": float(totals[0] / totals[1])}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- metrics --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._check_finite()
        if "loss" not in logs and "eval_loss" not in logs:
            return  # the base class's summary
        step, seconds = self.state.global_step, self.seconds
        size = self.settings.step_size(self.args.world_size)
        entry: dict[str, Any] = {"step": step, "epoch": round(step * size / len(self.train_dataset), 4), **logs}
        entry |= {"images": self.images, "seconds": round(seconds, 2)}
        if "loss" in logs:
            speed = (self.images - self._images_reported) / max(seconds - self._seconds_reported, 1e-9)
            self._images_reported, self._seconds_reported = self.images, seconds
            entry["images_per_second"] = round(speed, 2)
        self.state.log_history.append(entry)
        self._append_metrics(entry)
        self.report(
            Progress(step, self.total_steps, logs.get("loss"), logs.get("eval_loss"), self.speed, self._seconds_left())
        )
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    @property
    def speed(self) -> float:
        """Images per second, of the last steps that were reported."""
        return next((x["images_per_second"] for x in reversed(self.history) if "images_per_second" in x), 0.0)

    def _seconds_left(self) -> float:
        steps = self.state.global_step - self._steps_before
        per_step = (self.seconds - self._clock.before) / max(steps, 1)
        left = (self.args.max_steps - self.state.global_step) * per_step
        budget = self.settings.max_minutes
        return max(0.0, left if budget is None else min(left, 60 * budget - self.seconds))

    def _append_metrics(self, entry: dict[str, Any]) -> None:
        if not self.is_world_process_zero():
            return
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(_metrics_line(entry))
        except OSError as error:
            raise CheckpointError(f"cannot write {str(self.metrics_path)!r}: {error.strerror}.") from None

    def _restore_metrics(self, path: Path) -> None:
        """Forget what was measured after a checkpoint."""
        state = type(self.state).load_from_json(str(path / "trainer_state.json"))
        self.state.log_history = state.log_history
        if self.is_world_process_zero():
            self.metrics_path.write_text("".join(map(_metrics_line, state.log_history)), encoding="utf-8")

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.args.output_dir if self._writing is None else self._writing)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_finite()
        step = self.state.global_step
        with self.checkpoints.writing(step) as partial:
            self._writing = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing = None
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                mark = {"step": step, "seconds": self.seconds, "images": self.images, "run": self.run}
                self.checkpoints.complete(partial / f"checkpoint-{step}", mark)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the parts that train; the others are in the model that the run began with."""
        if not self.args.should_save:
            return
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        unwrapped = self.accelerator.unwrap_model(self.model)
        whole = unwrapped.state_dict() if state_dict is None else state_dict
        trains = tuple(unwrapped.trained_prefixes())
        seen: set[int] = set()
        kept = {}
        for name, tensor in whole.items():
            # Tied weights are one tensor, written once.
            if name.startswith(trains) and (tensor.data_ptr() not in seen or not tensor.numel()):
                seen.add(tensor.data_ptr())
                kept[name] = tensor.contiguous()
        safetensors.torch.save_file(kept, Path(output_dir) / "model.safetensors")


def _metrics_line(entry: dict[str, Any]) -> str:
    return json.dumps({key: entry[key] for key in _KEYS if key in entry}) + "\n"


@contextlib.contextmanager
def _float32_attention() -> Iterator[None]:
    """Attend in float32 under bfloat16 autocast: on the CPU, flash attention takes twice as long in bfloat16.

    Every part of every model finds the function in this place. A `TorchFunctionMode` would be off inside of
    `nn.MultiheadAttention`, and while checkpointed layers are computed again.
    """
    attend = nnf.scaled_dot_product_attention

    def attend_in_float32(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return attend(*map(_to_float, args), **{key: _to_float(x) for key, x in kwargs.items()})

    nnf.scaled_dot_product_attention = attend_in_float32
    try:
        yield
    finally:
        nnf.scaled_dot_product_attention = attend


def _to_float(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


class _Clock:
    """Seconds of training."""

    def __init__(self) -> None:
        self.before = 0.0  # of earlier runs
        self.at_step = 0.0  # when the current step began
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.monotonic()

    @property
    def now(self) -> float:
        return self.before + (0.0 if self._started is None else time.monotonic() - self._started)


class _Pace(TrainerCallback):
    """Ends a run in time, with a checkpoint."""

    def __init__(self, trainer: VLMTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_training()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        over = self.trainer.ends_now(state.global_step)
        if over or self.trainer.interrupted:
            control.should_training_stop = control.should_save = control.should_log = True
            control.should_evaluate = over and self.trainer.eval_dataset is not None


def _arguments(settings: TrainingSettings, folder: Path, *, use_cpu: bool, has_eval: bool) -> TrainingArguments:
    workers = settings.workers
    if workers is None:
        # On the CPU, the model needs the cores; small images decode faster than they travel between processes.
        workers = 0 if use_cpu else min(4, os.cpu_count() or 1)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=_UNBOUNDED,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        **_checkpointing(settings.gradient_checkpointing),
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide them, and wait for the device at each step
        save_strategy="steps",
        save_steps=settings.save_every,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=settings.save_every,
        use_cpu=use_cpu,
        ddp_backend="gloo" if use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )


def _checkpointing(enabled: bool) -> dict[str, Any]:
    # "activation" is its name since Transformers 5.23, and "gradient" is deprecated there.
    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {
        f"{kind}_checkpointing": enabled,
        f"{kind}_checkpointing_kwargs": {"use_reentrant": False} if enabled else None,
    }


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C is for the main process, which still needs its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _deferred_interrupt(trainer: VLMTrainer) -> Iterator[None]:
    """The first Ctrl-C ends the run after the current step, with a checkpoint; the second ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if trainer.interrupted:
            raise KeyboardInterrupt
        trainer.interrupted = True
        trainer.notify("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
