"""The settings of a training run.

`TrainingSettings` is the only source of the options of `vlm train`: their names, help, choices and defaults.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vlm_cli.composition import PARTS
from vlm_cli.errors import UsageError
from vlm_cli.flags import Alias, Flag, find_problems
from vlm_cli.registry import suggest
from vlm_cli.training.data_settings import MOST_STEPS, DataSettings
from vlm_cli.training.learning_settings import LearningSettings

__all__ = ["LENGTH", "RUN", "TrainingSettings"]

LENGTH, RUN = "Length of the run", "Run"  # headings in --help


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(LearningSettings, DataSettings):
    """How a model learns. The first limit that is reached, of epochs, steps and minutes, ends the run.

    Raises:
        UsageError: listing every value that is not possible.
    """

    epochs: Annotated[
        float | None,
        Flag(
            help="Stop after X passes over the records. If no limit is given, of passes, steps or minutes, X is 1.",
            heading=LENGTH,
            metavar="X",
            aliases=(Alias("--num-train-epochs"),),
            above=0,
            most=MOST_STEPS,
        ),
    ] = None
    max_steps: Annotated[
        int | None,
        Flag(help="Stop after N steps of the optimizer.", heading=LENGTH, metavar="N", above=0, most=MOST_STEPS),
    ] = None
    max_minutes: Annotated[
        float | None,
        Flag(
            help="Stop after X minutes, held-out losses included. The schedule of the learning rate ends at that time.",
            heading=LENGTH,
            metavar="X",
            above=0,
            most=MOST_STEPS,
        ),
    ] = None
    device: Annotated[
        Literal["auto", "cpu"],
        Flag(
            help="Train on a GPU if the machine has one (auto), or on the CPU.",
            heading=RUN,
            hint="To choose one of several GPUs, set CUDA_VISIBLE_DEVICES. To use several, start vlm with `torchrun` "
            "or `accelerate launch`.",
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Flag(help="Write OUT's weights with this dtype; auto is the dtype of MODEL.", heading=RUN),
    ] = "auto"
    save_every: Annotated[
        int,
        Flag(
            help="Write a checkpoint after every N steps.",
            heading=RUN,
            metavar="N",
            aliases=(Alias("--save-steps"),),
            above=0,
            most=MOST_STEPS,
        ),
    ] = 500
    report_to: Annotated[
        tuple[str, ...] | None,
        Flag(
            help="Send what is measured to these programs, too: tensorboard, wandb, trackio. Of tensorboard, OUT/runs "
            "holds the files. none sends nothing.",
            heading=RUN,
            metavar="NAME,…",
            items=("tensorboard", "wandb", "trackio"),
        ),
    ] = None
    best: Annotated[
        Literal["loss", "score"] | None,
        Flag(
            help="Keep the checkpoint with the lowest held-out loss, or with the most right answers (score, with "
            "--eval-answers), and write it as OUT. Without this option, OUT has the last weights.",
            heading=RUN,
        ),
    ] = None
    log_every: Annotated[
        int,
        Flag(
            help="Report the loss after every N steps.",
            heading=RUN,
            metavar="N",
            aliases=(Alias("--logging-steps"),),
            above=0,
            most=MOST_STEPS,
        ),
    ] = 10

    def __post_init__(self) -> None:
        if self.trainable == ("none",):
            object.__setattr__(self, "trainable", ())
        if self.report_to == ("none",):
            object.__setattr__(self, "report_to", None)
        problems = find_problems(self)
        for part in self.trainable or ():
            if part not in PARTS:
                problems.append(
                    f"unknown part {part!r} in --trainable.{suggest(part, PARTS)} Known: {', '.join(PARTS)}."
                )
        if self.global_batch_size is not None and self.gradient_accumulation != 1:
            problems.append("--global-batch-size and --gradient-accumulation contradict each other. Give one of them.")
        try:
            _ = self.adapters
        except UsageError as error:
            problems.append(str(error))
        if self.stochastic_rounding and not (self.bf16 and self.optimizer == "adamw"):
            problems.append("--stochastic-rounding rounds to bfloat16 in AdamW. Add --bf16, and leave out --optimizer.")
        problems += self._streaming_problems()
        if problems:
            raise UsageError("\n".join(problems))

    def _streaming_problems(self) -> list[str]:
        if not self.streaming:
            return [] if self.shuffle_buffer is None else ["--shuffle-buffer has a meaning only with --streaming."]
        if self.too_long == "cut":
            return ["--streaming does not count what it cuts. Give --too-long drop, which names the records, or error."]
        if self.epochs is not None and self.pack is not None:
            return ["with --streaming and --pack, nobody knows how long a pass is. Give --max-steps, not --epochs."]
        if self.epochs is not None and not self.check:
            return [
                "with --streaming, nobody counts the records of a pass. Give --max-steps or --max-minutes, not "
                "--epochs; or add --check, which reads all records before the first step."
            ]
        if self.epochs is None and self.max_steps is None and self.max_minutes is None:
            return ["--streaming never comes to an end by itself. Give --max-steps or --max-minutes."]
        return []

    def total_steps(self, num_records: int | None, num_processes: int) -> int | None:
        """Return the number of steps of the run; None if only `max_minutes` limits it.

        Args:
            num_records: of a pass; None if nobody has counted them.
            num_processes: that share the run.
        """
        epochs = self.epochs
        if epochs is None and self.max_steps is None and self.max_minutes is None:
            epochs = 1.0
        limits = [] if self.max_steps is None else [self.max_steps]
        if epochs is not None:
            assert num_records is not None  # see `_streaming_problems`
            limits.append(max(1, math.ceil(epochs * num_records / self.step_size(num_processes))))
        return min(limits, default=None)

    def step_size(self, num_processes: int) -> int:
        """Return the number of records in one step, over all processes."""
        return self.batch_size * self.accumulation(num_processes) * num_processes

    def accumulation(self, num_processes: int) -> int:
        """Return the number of batches of each process in one step.

        Raises:
            UsageError: if no number of batches makes up `global_batch_size`.
        """
        wanted, at_once = self.global_batch_size, self.batch_size * num_processes
        if wanted is None:
            return self.gradient_accumulation
        if wanted % at_once:
            raise UsageError(
                f"--global-batch-size {wanted} is no multiple of --batch-size × processes, {self.batch_size} × "
                f"{num_processes}. Change one of them."
            )
        return wanted // at_once

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
