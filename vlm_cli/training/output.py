"""Write the directory of a trained model: the model, and how it was trained."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from vlm_cli.checkpoint.directory import read_config
from vlm_cli.checkpoint.run_record import RUN_FILE
from vlm_cli.checkpoint.saving import save, save_adapted
from vlm_cli.composition import PARTS
from vlm_cli.errors import CheckpointError, VLMError
from vlm_cli.files import replacing_directory
from vlm_cli.modeling.config import stored_dtype
from vlm_cli.modeling.vlm import VLM
from vlm_cli.plain_data import read_json
from vlm_cli.processor import VLMProcessor
from vlm_cli.report.card import training_story
from vlm_cli.training.checkpoints import Checkpoints
from vlm_cli.training.job import Job
from vlm_cli.training.metrics import METRICS_FILE, MetricsLog
from vlm_cli.training.outcome import TrainingResult
from vlm_cli.training.plot import draw_losses
from vlm_cli.training.reporting import RUNS_FOLDER
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.watching import ANSWERS_FILE, PAGE_FILE
from vlm_cli.version import __version__

__all__ = ["describe_run", "digest_of_run", "write_output"]


def write_output(
    job: Job,
    model: VLM,
    processor: VLMProcessor,
    metrics: MetricsLog,
    result: TrainingResult,
    run: dict[str, Any],
) -> None:
    """Write the model, its record, the log, pictures of the losses and TensorBoard's files to the output of a job.

    Args:
        job: names the output and the folder of the checkpoints.
        model: the trained model, with the dtype that its files get.
        processor: the model's processor.
        metrics: the measurements of the run.
        result: the result of the run, which the model card tells.
        run: the content of `training_args.json`.

    Raises:
        VLMError: if the output cannot be written. The checkpoints stay.
    """
    out = job.output
    story = training_story(
        model, steps=result.steps, records=result.records, loss=result.loss, eval_loss=result.eval_loss
    )
    try:
        with replacing_directory(out, overwrite=job.overwrite) as partial:
            if model.config.adapters:
                base, changed = _base_of(job, model)
                save_adapted(
                    model,
                    processor,
                    partial,
                    base,
                    changed=changed,
                    backbones=job.backbones if base == job.beginning else None,
                    name=out.name,
                    story=story,
                    shim=job.shim,
                )
            else:
                save(model, processor, partial, name=out.name, story=story, shim=job.shim)
            for name in (METRICS_FILE, PAGE_FILE, ANSWERS_FILE):
                if (file := metrics.path.with_name(name)).exists():
                    shutil.copy(file, partial / name)
            if (runs := metrics.path.parent / RUNS_FOLDER).is_dir():
                shutil.copytree(runs, partial / RUNS_FOLDER)
            draw_losses(metrics.entries, partial / "loss.png", title=f"{out.name}: loss per token")
            if job.earlier is not None:
                run = {**run, "stages": _keep_stages(job.earlier, partial)}
            (partial / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")
            if not job.keep_checkpoints:
                for folder in (metrics.path.parent, *([] if job.earlier is None else [job.earlier])):
                    Checkpoints(folder).mark_finished(digest_of_run(partial))
    except VLMError as error:
        raise CheckpointError(
            f"{error} The trained weights are in {str(metrics.path.parent)!r}: correct the cause, then repeat the "
            "command with --resume."
        ) from error


def _keep_stages(folder: Path, out: Path) -> list[dict[str, Any]]:
    """Copy the measurements of earlier stages, and return the records of their runs."""
    records = []
    done = [path for path in folder.iterdir() if (path / RUN_FILE).is_file()]
    for stage in sorted(done, key=lambda path: int(path.name.partition("-")[0])):
        shutil.copy(stage / METRICS_FILE, out / f"metrics-{stage.name}.jsonl")
        records.append({"stage": stage.name, **read_json(stage / RUN_FILE)})
    return records


def _base_of(job: Job, model: VLM) -> tuple[str, set[str]]:
    """Return the model that an output with adapters names, and the parts that do not hold the tensors of that model.

    The models of earlier stages go when the run ends, so the last stage names the model with which the first began. A
    stage that kept fewer bits of each weight than the trained model does changed every part.
    """
    is_last = job.earlier is not None
    base = job.base if is_last and job.base is not None else job.model
    changed: set[str] = set()
    for path in job.earlier.glob("*/config.json") if job.earlier is not None else ():
        config = read_config(str(path.parent))
        changed |= set(PARTS if stored_dtype(config) != model.dtype else config.composition.trainable)
    if job.merge_adapters and base == job.beginning:
        changed |= set(read_config(base).adapters or ())
    return base, changed


def digest_of_run(out: Path) -> str:
    """Return the hash of the record of a run in its output; of an empty record if there is none."""
    try:
        return hashlib.sha256((out / RUN_FILE).read_bytes()).hexdigest()
    except OSError:
        return ""


def describe_run(
    job: Job, settings: TrainingSettings, result: TrainingResult, *, num_processes: int, use_cpu: bool
) -> dict[str, Any]:
    """Return the content of `training_args.json`: everything from which the run could be repeated, and its result."""
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "open_clip_torch")
    return {
        "job": {key: str(x) if isinstance(x, Path) else x for key, x in job.to_dict().items()},
        "settings": settings.to_dict(),
        "processes": num_processes,
        "threads": torch.get_num_threads(),
        "device": "cpu" if use_cpu else str(torch.accelerator.current_accelerator()),
        "versions": {"vlm_cli": __version__, **{name: version(name) for name in names}},
        "result": result.to_dict(),
    }
