"""Transformers' Trainer with the checkpoints of vlm: each is complete or not there, and holds what trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import nested_gather

from vlm_cli.training.budget import RunBudget
from vlm_cli.training.checkpoints import Checkpoints, RunHistory, UnloggedLosses, reading, select_trained
from vlm_cli.training.dataset import RecordDataset
from vlm_cli.training.metrics import MetricsLog
from vlm_cli.training.stream_state import write_stream_states
from vlm_cli.training.streaming import StreamedRecords
from vlm_cli.training.watch import FiniteWatch
from vlm_cli.training.watching import Watching

__all__ = ["CheckpointedTrainer"]


class CheckpointedTrainer(Trainer):
    """Write checkpoints, and read them. `VLMTrainer` sets the attributes."""

    checkpoints: Checkpoints
    run: dict[str, Any]
    history: RunHistory
    budget: RunBudget
    metrics: MetricsLog
    watch: FiniteWatch
    watching: Watching
    train_set: RecordDataset | StreamedRecords
    _tr_loss: Tensor
    _globalstep_last_logged: int
    _writing: Path | None = None  # where a checkpoint is being written

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed spreads the weights over the processes."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_training_state(max_steps, *args, **kwargs)
        # A checkpoint of an earlier version has no history.
        kept: Any = self.state.stateful_callbacks
        kept[RunHistory.__name__] = self.history.state()
        self.state.compute_steps(self.args, max_steps)  # a resumed state has the intervals of the earlier command
        return result

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.args.output_dir if self._writing is None else self._writing)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.watch.check()
        step = self.state.global_step
        unlogged = self._unlogged_losses()
        with self.budget.pause("checkpoint"), self.checkpoints.writing(step) as partial:
            self._writing = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing = None
            if isinstance(self.train_set, StreamedRecords):
                states = gather_object([self.train_set.state()])
                if self.is_world_process_zero():
                    write_stream_states(partial / f"checkpoint-{step}", states)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.checkpoints.complete(
                    partial / f"checkpoint-{step}",
                    step=step,
                    seconds=self.budget.seconds,
                    images=self.metrics.images,
                    run=self.run,
                    unlogged=unlogged,
                )
                self.watching.keep_best(self.checkpoints.folder / f"checkpoint-{step}", step, self.metrics.entries)
        self.accelerator.wait_for_everyone()

    def _unlogged_losses(self) -> UnloggedLosses | None:
        """Return the sum of the losses since the last entry of the log; None right after an entry."""
        last = self._globalstep_last_logged
        if last == self.state.global_step:
            return None
        return UnloggedLosses(last, float(nested_gather(self._tr_loss, self.args.parallel_mode).mean()))

    def _restore_losses(self, unlogged: UnloggedLosses) -> None:
        """Continue the mean of the losses that a checkpoint has begun."""
        self._globalstep_last_logged = unlogged.last_logged
        self._tr_loss.fill_(unlogged.total)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the parts that train. The other parts are in the model with which the run began."""
        if not self.args.should_save:
            return
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        trained = select_trained(model, model.state_dict() if state_dict is None else state_dict)
        safetensors.torch.save_file(trained, Path(output_dir) / "model.safetensors")
