"""From our settings to Transformers' `TrainingArguments`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from vlm_cli.modeling.config import VLMConfig
from vlm_cli.training.learning_settings import DEFAULT_RATE
from vlm_cli.training.rates import highest_rate
from vlm_cli.training.settings import TrainingSettings

__all__ = ["keep_use_cache", "make_arguments"]

_ABSENT = object()


def make_arguments(
    settings: TrainingSettings, folder: Path, *, use_cpu: bool, has_eval: bool, finds_unused: bool
) -> TrainingArguments:
    """Translate settings. The number of steps is set later, when the number of processes is known.

    Args:
        settings: of the run.
        folder: where the checkpoints are.
        use_cpu: train on the CPU, whatever accelerators the machine has.
        has_eval: measure the held-out loss at each checkpoint.
        finds_unused: with several processes, look in each step for trained parameters that have no gradient.
    """
    workers = settings.workers
    if workers is None:
        # On the CPU the model needs the cores, and a small image decodes faster than it travels between processes.
        workers = 0 if use_cpu else min(4, os.cpu_count() or 1)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation(int(os.environ.get("WORLD_SIZE", "1"))),
        learning_rate=highest_rate(settings.learning_rate, default=DEFAULT_RATE),
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        **_checkpointing(settings.gradient_checkpointing),
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter hides such losses, and waits for the device at each step
        save_strategy="steps",
        save_steps=settings.save_every,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=settings.save_every,
        use_cpu=use_cpu,
        ddp_backend="gloo" if use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ddp_find_unused_parameters=finds_unused,
        dataloader_num_workers=workers,
        ignore_data_skip=settings.streaming,  # a stream continues where it was, by itself
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],  # `make_reporters` makes them
        run_name=folder.name.removesuffix(".checkpoints"),
        project="vlm",
        disable_tqdm=True,
        log_level="error",
    )


@contextlib.contextmanager
def keep_use_cache(config: VLMConfig) -> Iterator[None]:
    """Restore `use_cache` after the block. Trainer's constructor changes it, and `save` would write the change."""
    before = config.__dict__.get("use_cache", _ABSENT)
    try:
        yield
    finally:
        config.__dict__.pop("use_cache", None)
        if before is not _ABSENT:
            config.use_cache = before


def _checkpointing(enabled: bool) -> dict[str, Any]:
    # Since Transformers 5.23 the option is called "activation", and "gradient" is deprecated.
    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {
        f"{kind}_checkpointing": enabled,
        f"{kind}_checkpointing_kwargs": {"use_reentrant": False} if enabled else None,
    }
