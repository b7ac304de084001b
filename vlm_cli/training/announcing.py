"""Tell the user what a run is about to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.training.checkpoints import RunHistory, TrainingCheckpoint
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.streaming import StreamedRecords
from vlm_cli.training.trainer import VLMTrainer

__all__ = ["announce", "count_trained", "tell_changes"]


def count_trained(model: VLM) -> int:
    """Count the parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def tell_changes(checkpoint: TrainingCheckpoint | None, history: RunHistory, tell: Callable[[str], None]) -> None:
    """Tell the user which settings change now; `training_args.json` will hold them."""
    if checkpoint is None or len(history.changes) == len(checkpoint.history.changes):
        return
    changed = {name: x for name, x in history.changes[-1].items() if name != "step"}
    words = ", ".join(f"{name} {now} (was {was})" for name, (was, now) in changed.items())
    tell(f"Note: from step {checkpoint.step} on, the run has {words}.")


def announce(
    model: VLM, trainer: VLMTrainer, settings: TrainingSettings, num_processes: int, tell: Callable[[str], None]
) -> None:
    """Tell the user what trains, on what, and for how long."""
    data, eval_set = trainer.train_set, trainer.eval_set
    steps, minutes = trainer.budget.max_steps, settings.max_minutes
    row = "record" if settings.pack is None else "packed row"
    size = count_of(settings.step_size(num_processes), row)
    limits = [] if steps is None else [f"{count_of(steps, 'step')} of {size}"]
    limits += [] if minutes is None else [f"{minutes:g} minute{'' if minutes == 1 else 's'}"]
    held_out = "" if eval_set is None else f" (and {len(eval_set)} held out)"
    if isinstance(data, StreamedRecords) or data.num_images.any():
        tell(f"Images: {data.preprocessing}")
    for name, numbers in (("rates", settings.learning_rate), ("weight decay", settings.weight_decay)):
        if isinstance(numbers, Mapping):
            tell(f"Own {name}: {', '.join(f'{part} {x:g}' for part, x in numbers.items())}.")
    tell(
        f"Training {', '.join(model.trained_names())} ({count_trained(model):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters) on {data.describe_whole()}{held_out} "
        f"for {' or '.join(limits)}. Checkpoints in {trainer.checkpoints.folder}"
    )
