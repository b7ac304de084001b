"""The record of the training run in a model's directory: what a copy of the model in another form keeps of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vlm_cli.modeling.vlm import VLM
from vlm_cli.plain_data import read_json
from vlm_cli.report.card import training_story

__all__ = ["RUN_FILE", "copy_run_record", "read_story"]

RUN_FILE = "training_args.json"  # settings and result of the run
_FILES = (RUN_FILE, "metrics.jsonl", "loss.png")


def copy_run_record(source: Path, out: Path) -> None:
    """Copy the files that `vlm train` wrote beside the model, where there are any."""
    for name in _FILES:
        if (source / name).is_file():
            shutil.copy(source / name, out / name)


def read_story(source: Path, model: VLM) -> str | None:
    """Return the sentences of a model card on how the model was trained; None if its directory has no whole record."""
    try:
        result: dict[str, Any] = read_json(source / RUN_FILE)["result"]
        steps, records = int(result["steps"]), int(result["records"])
        losses = {key: None if result.get(key) is None else float(result[key]) for key in ("loss", "eval_loss")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return training_story(model, steps=steps, records=records, **losses)
