"""Transformers' Trainer, with the composition's parameter groups, complete checkpoints and one stream of batches.

Transformers and Accelerate handle devices, processes, precision and sharding. This class joins the parts of a run:

    CheckpointedTrainer  writes and reads checkpoints  (checkpointed.py)
    RunBudget            steps and minutes             (budget.py)
    MetricsLog           losses and speed              (metrics.py)
    FiniteWatch          stops at a loss of nan        (watch.py)
    order_records        order of the records          (loaders.py)
    Operations           operations of a step          (operations.py)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from transformers.trainer_callback import TrainerState

from vlm_cli.data.skipped import SkippedRows
from vlm_cli.errors import DataError, UsageError
from vlm_cli.interrupt import ALL_SIGNALS, Interrupted, deferred_signals
from vlm_cli.media.notes import NoteTally
from vlm_cli.modeling.vlm import VLM
from vlm_cli.report.tables import human_flops
from vlm_cli.training.arguments import keep_use_cache, make_arguments
from vlm_cli.training.budget import EndInTime, RunBudget
from vlm_cli.training.callbacks import RestoreLosses, TellSteps
from vlm_cli.training.checkpointed import CheckpointedTrainer
from vlm_cli.training.checkpoints import (
    Checkpoints,
    RunHistory,
    TrainingCheckpoint,
    reading,
)
from vlm_cli.training.dataset import Collator, RecordDataset, check_batch
from vlm_cli.training.learning_settings import DEFAULT_RATE
from vlm_cli.training.loaders import make_loader, order_by_size, order_records
from vlm_cli.training.measures import held_out_loss, measure_model
from vlm_cli.training.metrics import METRICS_FILE, MetricsLog
from vlm_cli.training.operations import Operations, find_peak
from vlm_cli.training.optimizer import make_optimizer, set_learning_rates
from vlm_cli.training.outcome import RunOutcome, StepReport
from vlm_cli.training.packing import count_packs
from vlm_cli.training.precision import float32_attention
from vlm_cli.training.rates import group_parameters, rates_now
from vlm_cli.training.reporting import make_reporters
from vlm_cli.training.schedule import make_schedule
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.sharding import GatherForMethods, blank_media, check_sharding
from vlm_cli.training.streaming import StreamedRecords
from vlm_cli.training.watch import FiniteWatch
from vlm_cli.training.watching import Watching, preserved_randomness

__all__ = ["VLMTrainer"]


class VLMTrainer(CheckpointedTrainer):
    """Train a `VLM` on records.

    Args:
        model: a `VLM` whose trainable parts are set.
        settings: how the model learns.
        train_set: the records to learn.
        eval_set: the records for the held-out loss; None measures none.
        checkpoints: where the state is kept.
        run: what must be the same when the run is resumed; each checkpoint stores it.
        history: what may change when the run is resumed; each checkpoint stores it.
        report: is called with each report.
        step_done: is called after each step; see `Listener`.
        notify: is called with messages for the user.
        watching: what else is measured and shown while the model trains.
        use_cpu: train on the CPU, whatever accelerators the machine has.
    """

    control: Any
    lr_scheduler: Any
    optimizer: Any

    def __init__(
        self,
        model: VLM,
        settings: TrainingSettings,
        train_set: RecordDataset | StreamedRecords,
        eval_set: RecordDataset | None,
        checkpoints: Checkpoints,
        *,
        run: dict[str, Any],
        history: RunHistory,
        report: Callable[[StepReport], None],
        step_done: Callable[[int, int | None, float], None],
        notify: Callable[[str], None],
        watching: Watching,
        use_cpu: bool,
    ) -> None:
        self.settings, self.train_set, self.eval_set = settings, train_set, eval_set
        self.checkpoints, self.run, self.report, self.notify = checkpoints, run, report, notify
        self.picture_notes = NoteTally()
        self.history, self.step_done, self.watching = history, step_done, watching
        # A vision tower's pooling and projection do not contribute to its patch features, so they get no gradient.
        finds_unused = "vision_encoder" in (*model.config.composition.trainable, *(model.config.adapters or ()))
        arguments = make_arguments(
            settings, checkpoints.folder, use_cpu=use_cpu, has_eval=eval_set is not None, finds_unused=finds_unused
        )
        self.rows_per_pass = train_set.num_records
        self.order_seed = settings.seed
        if isinstance(train_set, RecordDataset):
            self.order_seed = settings.seed if train_set.seed is None else train_set.seed
            if settings.pack is not None:
                self.rows_per_pass = count_packs(
                    train_set.positions, length=settings.pack, seed=self.order_seed, shares=train_set.shares
                )
        self.budget = RunBudget(
            settings.total_steps(self.rows_per_pass, arguments.world_size),
            settings.max_minutes,
            pause_every=settings.save_every,
            eval_steps=0 if eval_set is None else len(eval_set) / settings.step_size(arguments.world_size),
        )
        arguments.max_steps = self.budget.steps
        self.watch = FiniteWatch(train_set, checkpoints)
        self._step_records: list[Any] = []
        with keep_use_cache(model.config):
            super().__init__(
                model,
                arguments,
                data_collator=Collator(model.config.pad_token_id or 0),
                train_dataset=cast(Any, train_set),
                eval_dataset=eval_set,
                callbacks=[history, *make_reporters(settings.report_to, checkpoints.folder)],
            )
        check_sharding(self.is_sharded)
        self.operations, self._told_operations = self._make_operations(model), False
        self.metrics = MetricsLog(
            checkpoints.folder / METRICS_FILE, self.operations.measure, writes=self.is_world_process_zero()
        )
        self.remove_callback(PrinterCallback)

    def _make_operations(self, model: VLM) -> Operations:
        """Make what counts the operations of a pass, where they pass through torch one by one and whole."""
        problem = None
        if self.settings.compile:
            problem = "--compile joins operations to others that nobody counts"
        elif self.is_sharded:
            problem = "each process computes a share of each operation"
        processes = self.args.world_size
        peak = None if problem else find_peak(self.args.device, bf16=self.args.bf16, processes=processes)
        return Operations(model, peak, problem)

    # -- the run --------------------------------------------------------------------------------------------------

    def _check_watching(self) -> None:
        """Refuse what needs all weights in one process.

        Raises:
            UsageError: naming the options.
        """
        if self.is_sharded and (self.watching.examiner is not None or self.watching.best is not None):
            raise UsageError(
                "FSDP and DeepSpeed spread the weights over the processes, where --eval-answers and --best need whole "
                "ones. Leave these options out, and run `vlm eval` on OUT."
            )

    def run_from(self, checkpoint: TrainingCheckpoint | None) -> RunOutcome:
        """Train to the end, from the beginning or from a checkpoint. A signal ends the run after its step.

        Raises:
            Interrupted: after a signal.
            VLMError: if the loss is not a number, an image is damaged, or a checkpoint cannot be written.
        """
        self._check_watching()
        if checkpoint is not None:
            self.budget.continue_from(checkpoint.step, checkpoint.seconds)
            with reading(checkpoint.path):
                state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
                self.metrics.restore(
                    state.log_history, step=checkpoint.step, images=checkpoint.images, seconds=checkpoint.seconds
                )
                self.watching.restore(checkpoint.path, checkpoint.step, self.metrics.entries)
                os.path.isdir(state.best_model_checkpoint or "")  # as Transformers asks later, where nobody explains it
        if checkpoint is not None and self.budget.is_over(checkpoint.step, checkpoint.seconds):
            self._load_from_checkpoint(str(checkpoint.path))
            self.state.global_step = checkpoint.step
        else:
            self._train_from(checkpoint)
        steps, seconds = self.state.global_step, self.budget.seconds
        best_step = self._load_best()
        self._update_page(is_over=True)
        gathered = self.accelerator.get_state_dict(self.model_wrapped) if self.is_sharded else None
        return RunOutcome(steps, seconds, self.metrics.images, self.metrics, gathered, best_step)

    def _load_best(self) -> int | None:
        """Give the model the weights of the best checkpoint, if they are kept; return its step."""
        if self.watching.best is None:
            return None
        found = self.watching.best.find(self.metrics.entries)
        step = self.watching.best.find_step(self.metrics.entries)
        if found is None:
            self.notify("Note: no checkpoint was measured, so the last weights are kept.")
            return None
        if step != self.state.global_step:
            self._load_from_checkpoint(str(found))
        return step

    def _train_from(self, checkpoint: TrainingCheckpoint | None) -> None:
        """Train until the budget is used.

        Several processes would have to agree on the step after which they stop, so a signal ends them at once.

        Raises:
            Interrupted: after a signal.
        """
        announcement = "Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once."
        numbers = ALL_SIGNALS if self.args.world_size == 1 else ()
        with deferred_signals(announcement, numbers=numbers) as received:
            evaluates = self.eval_set is not None
            self.add_callback(EndInTime(self.budget, is_interrupted=received, evaluates=evaluates))
            self.add_callback(RestoreLosses(None if checkpoint is None else checkpoint.unlogged, self._restore_losses))
            self.add_callback(GatherForMethods())
            self.add_callback(TellSteps(self.budget, self.step_done))
            self.args.eval_on_start = self.watching.examiner is not None and checkpoint is None
            try:
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
            except RuntimeError:
                if received.number is None:
                    raise
                # A signal to the whole group of processes ends the workers, too, and the DataLoader misses them.
        if received.number is not None:
            raise Interrupted(number=received.number)

    # -- optimizer ------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None:
            unwrapped = self.accelerator.unwrap_model(self.model if model is None else model)
            settings = self.settings
            groups = group_parameters(
                unwrapped,
                settings.learning_rate,
                default_rate=DEFAULT_RATE,
                weight_decay=settings.weight_decay,
                layer_decay=settings.layer_decay,
            )
            self.optimizer = make_optimizer(
                unwrapped, settings.optimizer, groups, rounds_at_random=settings.stochastic_rounding
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.schedule = make_schedule(self.settings, float(max(group["lr"] for group in optimizer.param_groups)))
            self.lr_scheduler = LambdaLR(optimizer, lambda step: self._factor(step))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _factor(self, step: int) -> float:
        """Return the share of the highest learning rate at a step."""
        return self.schedule.factor(step, self.budget.expected_steps(step))

    def _get_learning_rate(self) -> float:
        """Return the highest learning rate now, which the log shows."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        wanted = [(float(group["initial_lr"]), group["weight_decay"]) for group in self.optimizer.param_groups]
        with reading(checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)
        factor = self._factor(self.lr_scheduler.last_epoch)
        set_learning_rates(self.optimizer, self.lr_scheduler, wanted, factor)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, Tensor):
            self.watch.add(self.state.global_step + 1, "gradient", self._step_records, grad_norm)
        return grad_norm

    # -- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        data, size = self.train_set, self.settings.step_size(self.args.world_size)
        if isinstance(data, StreamedRecords):
            return data.batches(self.args.dataloader_num_workers, pin=self.args.device.type == "cuda")
        rows, order = order_records(data, self.settings, self.budget.steps * size, step=size, seed=self.order_seed)
        return self.accelerator.prepare(make_loader(rows, order, self.data_collator, self.args))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[dict[str, Any]]:
        assert self.eval_set is not None
        loader = make_loader(self.eval_set, order_by_size(self.eval_set), self.data_collator, self.args)
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Return the batches of the next step; a damaged image is an error here."""
        self._step_records = []
        try:
            batches = super().get_batch_samples(self._checked(epoch_iterator), num_batches, device)
        except DataError as error:
            raise DataError(f"{error} {self._keep_steps()}".rstrip()) from None
        if isinstance(self.train_set, StreamedRecords):
            self.train_set.mark_learned()  # a checkpoint is written after the step
        return batches

    def skipped_rows(self) -> SkippedRows:
        """Return the rows of a stream that all processes skipped, since the beginning of the run."""
        joined = SkippedRows()
        if not isinstance(self.train_set, StreamedRecords):
            return joined
        for state in gather_object([self.train_set.skipped.state()]):
            joined.join(SkippedRows.continued(state))
        return joined

    def _checked(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return (check_batch(batch, self.picture_notes) for batch in batches)

    def _keep_steps(self) -> str:
        """Write a checkpoint of the steps before a damaged image, and say where it is.

        Several processes would have to agree on it, so they keep the last checkpoint that they wrote.
        """
        last, step = self.checkpoints.last(), self.state.global_step
        if self.args.world_size == 1 and step > (0 if last is None else last.step):
            self._save_checkpoint(cast(nn.Module, self.model), trial=None)
            last = self.checkpoints.last()
        if last is None:
            return ""
        kept = f"{str(last.path)!r} keeps the run at step {last.step}."
        return f"{kept} Mend the data, and repeat the command with --resume."

    # -- loss -----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        images = self.train_set.count_images(inputs["records"])
        with self._attention(), self.operations.counting(inputs["input_ids"].numel(), images):
            return super().training_step(model, inputs, *args, **kwargs)

    def _attention(self) -> AbstractContextManager[None]:
        is_slow = self.args.bf16 and self.args.device.type == "cpu"
        return float32_attention() if is_slow else contextlib.nullcontext()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        records, num_tokens = inputs.pop("records"), inputs.pop("num_tokens")
        is_text = self._fill_media(inputs)
        result: Any = super().compute_loss(
            model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch=num_items_in_batch
        )
        self.metrics.images += self.train_set.count_images(records) * self.args.world_size
        self.metrics.tokens += num_tokens * self.args.world_size
        self._step_records = [*self._step_records, *records]
        if is_text and self.args.world_size == 1 and not return_outputs:
            # Text alone leaves the parts that read images without a gradient, and the loss perhaps without any.
            result = result + 0.0 * torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum()
        loss = result[0] if return_outputs else result
        self.watch.add(self.state.global_step + 1, "loss", records, loss.detach())
        return result

    def _fill_media(self, inputs: dict[str, Any]) -> bool:
        """Tell whether a batch is text alone; if several processes train, it gets media that nobody sees."""
        is_text = not inputs.keys() & {"pixel_values", "vision_features"}
        if is_text and self.args.world_size > 1:
            model = self.accelerator.unwrap_model(self.model)
            is_encoded = getattr(self.train_set, "features", None) is not None  # streamed records have none
            inputs |= blank_media(model, len(inputs["input_ids"]), self.args.device, encoded=is_encoded)
        return is_text

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The base class counts the parameters again at each step.
        return 0

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the held-out loss and put the held-out questions; what is learned later does not change by that."""
        with self.budget.pause("eval"), preserved_randomness():
            metrics = self._measure_held_out() | self._examine()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _examine(self) -> dict[str, float]:
        """Put the held-out questions to the model, in the main process."""
        if self.watching.examiner is None:
            return {}
        if self.is_world_process_zero():
            with self.accelerator.autocast(), self._attention():
                self.watching.examine(self.state.global_step)
        self.accelerator.wait_for_everyone()
        return self.watching.last_scores()

    def _measure_held_out(self) -> dict[str, float]:
        """Return the mean loss over all learned tokens of the held-out records."""
        self.watch.check()
        model: Any = self.model_wrapped if self.is_sharded else self.model
        model.eval()
        batches = (self._prepare_inputs(batch) for batch in self._checked(self.get_eval_dataloader()))
        # `gather_for_metrics` leaves out the rows that Accelerate repeats to fill the last batch.
        gather = self.accelerator.gather_for_metrics
        with self._attention():
            return {"eval_loss": held_out_loss(model, batches, fill_media=self._fill_media, gather=gather)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.watch.check()
        if "loss" not in logs and "eval_loss" not in logs:
            return  # the summary of the base class
        model = None if self.is_sharded else self.accelerator.unwrap_model(self.model)
        rates = rates_now(self.optimizer.param_groups, logs.get("learning_rate"))
        logs = logs | rates | measure_model(model, self.args.device)
        step, budget = self.state.global_step, self.budget
        done = step * self.settings.step_size(self.args.world_size)
        epoch = None if self.rows_per_pass is None else round(done / self.rows_per_pass, 4)
        place = {"step": step} if epoch is None else {"step": step, "epoch": epoch}
        entry = self.metrics.append(place | logs, seconds=budget.seconds, training=budget.training_seconds)
        self.state.log_history.append(entry)
        self.report(
            StepReport(
                step,
                budget.max_steps,
                logs.get("loss"),
                logs.get("eval_loss"),
                self.metrics.images_per_second,
                budget.seconds_left(step),
                epoch,
                logs.get("learning_rate"),
                logs.get("grad_norm"),
                self.metrics.last("tokens_per_second"),
                self.watching.last if "exact" in logs else None,
            )
        )
        self._tell_operations(entry)
        self._update_page(is_due="eval_loss" in logs)
        measured = {name: x for name, x in entry.items() if name != "step"}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, measured)

    def _tell_operations(self, entry: dict[str, Any]) -> None:
        """Tell once what a step computes, or why nobody knows."""
        if "loss" not in entry or self._told_operations:
            return
        self._told_operations = True
        if "flops_per_step" in entry:
            self.notify(self.operations.describe(entry["flops_per_step"]))
        else:
            self.notify(f"Note: the operations of a step are not counted: {self.operations.problem}.")

    def _update_page(self, *, is_due: bool = False, is_over: bool = False) -> None:
        step, budget = self.state.global_step, self.budget
        total = "" if budget.max_steps is None else f" of {budget.max_steps:,}"
        facts = {"step": f"{step:,}{total}", "time": f"{budget.seconds:,.0f} s"}
        if (flops := self.metrics.last("flops_per_step")) is not None:
            facts["operations"] = f"{human_flops(flops)}FLOP a step"
        if (used := self.metrics.last("utilisation")) is not None and (peak := self.operations.peak) is not None:
            facts["use of the device"] = f"{used:.1%} of {human_flops(peak)}FLOP a second"
        if not is_over:
            facts["time left"] = f"about {budget.seconds_left(step):,.0f} s"
        progress = None if is_over else min(1.0, budget.progress(step))
        self.watching.update(self.metrics.entries, facts, progress, is_due=is_due or is_over)
