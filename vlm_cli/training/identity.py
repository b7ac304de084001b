"""Tell one run from another: `--resume` may continue a run only with the same model, records, order and optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from vlm_cli.errors import UsageError
from vlm_cli.modeling.vlm import VLM
from vlm_cli.resume import settings_diff
from vlm_cli.training.checkpoints import TrainingCheckpoint
from vlm_cli.training.dataset import RecordDataset
from vlm_cli.training.settings import Job, TrainingSettings

__all__ = ["check_same_run", "identify_run"]


def identify_run(
    job: Job, settings: TrainingSettings, model: VLM, data: RecordDataset, num_processes: int
) -> dict[str, Any]:
    """Describe a run by what must not change when it is resumed. The keys are options of `vlm train`.

    Checkpoints store the description, so that its keys must stay as they are.
    """
    return {
        "MODEL": f"{job.model} ({_hash_weights(model)})",
        "--data": f"{len(data)} records ({data.sha256[:12]})",
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


def _hash_weights(model: VLM) -> str:
    """Return a few characters that differ between models with different weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.flatten()[:4].tolist()}".encode())
    return digest.hexdigest()[:12]
