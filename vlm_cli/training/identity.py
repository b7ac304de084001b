"""Tell one run from another: `--resume` may continue a run only with the same model, records, order and optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from vlm_cli.errors import UsageError
from vlm_cli.flags import OTHERS
from vlm_cli.modeling.vlm import VLM
from vlm_cli.resume import settings_diff
from vlm_cli.training.checkpoints import RunHistory, TrainingCheckpoint
from vlm_cli.training.dataset import RecordDataset
from vlm_cli.training.job import Job
from vlm_cli.training.processes import asks_for_sharding
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.streaming import StreamedRecords
from vlm_cli.writing.choice import TemplateChoice

__all__ = ["check_same_run", "continue_history", "identify_run"]


def identify_run(
    job: Job, settings: TrainingSettings, model: VLM, data: RecordDataset | StreamedRecords, num_processes: int
) -> dict[str, Any]:
    """Describe a run by what must not change when it is resumed. The keys are options of `vlm train`.

    Checkpoints store the description, so that its keys must stay as they are.
    """
    # Checkpoints of earlier versions have no such keys.
    template = TemplateChoice.parse(settings.chat_template)
    written = {
        "--chat-template": None if template.name == "auto" else template.identity,
        "--special-tokens": settings.special_tokens,
        "--columns": job.reading.to_dict()["columns"],
        # The optimizer's groups follow from these; the numbers themselves may change.
        "--layer-decay": settings.layer_decay is not None,
        "FSDP": asks_for_sharding(),  # its checkpoints have files of their own
        "--pack": settings.pack,
        "--stochastic-rounding": settings.stochastic_rounding,
        "--too-long": None if settings.too_long == "error" else settings.too_long,
        **(data.plan_identity() if isinstance(data, StreamedRecords) else data.mixture_identity()),
    }
    named = {"--learning-rate": settings.learning_rate, "--weight-decay": settings.weight_decay}
    parts = {f"parts in {k}": sorted(set(x) - {OTHERS}) for k, x in named.items() if isinstance(x, Mapping)}
    adapters = {part: vars(x) for part, x in settings.adapters.items()}
    return {
        **({"--lora": adapters} if adapters else {}),
        **parts,
        **{option: value for option, value in written.items() if value},
        "MODEL": f"{job.model} ({_hash_weights(model)})",
        "--data": data.identity(),
        "--batch-size × --gradient-accumulation × processes": settings.step_size(num_processes),
        "--group-by-length": settings.group_by_length,
        "--seed": settings.seed,
        "--optimizer": settings.optimizer,
        "--trainable": list(model.config.composition.trainable),
    }


def check_same_run(checkpoint: TrainingCheckpoint, run: Mapping[str, Any]) -> None:
    """Check that a checkpoint was written by the same run.

    Raises:
        UsageError: naming everything that differs between the checkpoint's run and this run.
    """
    if differences := settings_diff(checkpoint.run, run):
        raise UsageError(
            f"{str(checkpoint.path)!r} belongs to another run, so that --resume cannot continue it:\n{differences}\n"
            "Give the same values again, or start a new run with --overwrite."
        )


def continue_history(checkpoint: TrainingCheckpoint | None, settings: TrainingSettings) -> RunHistory:
    """Describe the settings that may change when a run is resumed, and note what has changed so far.

    Args:
        checkpoint: where the run continues; None for a new run.
        settings: of this command.
    """
    now = {_option(name): getattr(settings, name) for name in _MAY_CHANGE}
    if checkpoint is None:
        return RunHistory(now)
    earlier = checkpoint.history
    was = earlier.settings
    differ = {name: [was[name], now[name]] for name in now if name in was and was[name] != now[name]}
    return RunHistory(now, [*earlier.changes, *([{"step": checkpoint.step, **differ}] if differ else [])])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


#: Settings by which a model learns and that a resumed run may change: to go on longer, or after a loss of nan.
_MAY_CHANGE = (
    "learning_rate",
    "layer_decay",
    "schedule",
    "schedule_options",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "epochs",
    "max_steps",
    "max_minutes",
)


def _hash_weights(model: VLM) -> str:
    """Return a few characters that differ between models with different weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:4].tolist()}".encode())
    return digest.hexdigest()[:12]
