"""What a run is told: files, and how to learn from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_cli.composition import PARTS
from vlm_cli.errors import UsageError
from vlm_cli.registry import suggest

__all__ = ["Job", "TrainingSettings"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Which files a run reads and writes.

    Attributes:
        model: directory that `vlm build` wrote, or a hub id.
        data: records to learn.
        output: directory to write.
        eval_data: records for the held-out loss.
        resume: go on from the last complete checkpoint, if there is one.
        overwrite: replace the output, and forget an unfinished run.
        keep_checkpoints: leave them when the output is written.
        trust_remote_code: run the language model's own code from the model's directory.
    """

    model: str
    data: Path
    output: Path
    eval_data: Path | None = None
    resume: bool = False
    overwrite: bool = False
    keep_checkpoints: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to learn. Of `epochs`, `max_steps` and `max_minutes`, the first that is reached ends the run."""

    learning_rate: float = 1e-4  # at its highest
    optimizer: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03  # steps; below 1, a share of the run
    weight_decay: float | None = None  # None: the composition's
    clip: float = 1.0  # most that the gradient's norm may be; 0 does not clip
    epochs: float | None = None  # None: 1, unless the run is bounded otherwise
    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 8  # records per process and step of accumulation
    gradient_accumulation: int = 1  # batches per step
    group_by_length: bool = True
    trainable: tuple[str, ...] | None = None  # parts; None: the composition's
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_every: int = 500  # steps
    log_every: int = 10  # steps
    seed: int = 0
    device: str = "auto"  # or cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights that are written
    workers: int | None = None  # processes that decode images; None: as many as help

    def __post_init__(self) -> None:
        problems = [*self._choices(), *self._numbers()]
        for part in self.trainable or ():
            if part not in PARTS:
                problems.append(
                    f"unknown part {part!r} in --trainable.{suggest(part, PARTS)} Known: {', '.join(PARTS)}."
                )
        if self.trainable == ():
            problems.append(f"--trainable names no part. Known: {', '.join(PARTS)}.")
        if self.device not in ("auto", "cpu"):
            problems.append(
                f"--device must be auto or cpu, got {self.device!r}. One of several GPUs is chosen by "
                "CUDA_VISIBLE_DEVICES, several are used by `torchrun` and `accelerate launch`."
            )
        if problems:
            raise UsageError("\n".join(problems))

    def _choices(self) -> list[str]:
        problems = []
        for name, known in (
            ("optimizer", ("adamw", "muon")),
            ("schedule", ("cosine", "linear", "constant")),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
        ):
            value = getattr(self, name)
            if value not in known:
                problems.append(f"unknown {name} {value!r}.{suggest(value, known)} Known: {', '.join(known)}.")
        return problems

    def _numbers(self) -> list[str]:
        above_zero = ("learning_rate", "epochs", "max_steps", "max_minutes", "batch_size", "gradient_accumulation")
        positive = (*above_zero, "save_every", "log_every")
        not_negative = ("warmup", "weight_decay", "clip", "workers", "seed")
        problems = []
        for name in (*positive, *not_negative):
            value = getattr(self, name)
            if value is None:
                continue
            flag = f"--{name.replace('_', '-')}"
            if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
                problems.append(f"{flag} must be {'above 0' if name in positive else '0 or more'}, got {value}.")
        return problems

    def total_steps(self, num_records: int, num_processes: int) -> int | None:
        """Steps of the run; None if only its minutes bound it."""
        epochs = self.epochs
        if epochs is None and self.max_steps is None and self.max_minutes is None:
            epochs = 1.0
        bounds = [] if self.max_steps is None else [self.max_steps]
        if epochs is not None:
            bounds.append(max(1, math.ceil(epochs * num_records / self.step_size(num_processes))))
        return min(bounds, default=None)

    def step_size(self, num_processes: int) -> int:
        """Records of one step, over all processes."""
        return self.batch_size * self.gradient_accumulation * num_processes

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
