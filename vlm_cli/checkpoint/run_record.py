"""The record of the training run in a model's directory: what a copy of the model in another form keeps of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from vlm_cli.modeling.vlm import VLM
from vlm_cli.plain_data import read_json
from vlm_cli.report.card import training_story
from vlm_cli.report.card_sections import Card

__all__ = ["RUN_FILE", "copy_run_record", "keep_card", "read_story"]

RUN_FILE = "training_args.json"  # settings and result of the run
_FILES = (RUN_FILE, "metrics*.jsonl", "loss.png", "run.html", "answers.jsonl")
CARD_FILE = "README.md"


def copy_run_record(source: Path, out: Path) -> None:
    """Copy the files that `vlm train` wrote beside the model, where there are any."""
    for pattern in _FILES:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copy(path, out / path.name)


def keep_card(source: Path, out: Path) -> None:
    """Put what a person wrote into the card of one directory into that of another, which vlm has just written."""
    try:
        old, new = (Card.parse((folder / CARD_FILE).read_text(encoding="utf-8")) for folder in (source, out))
    except (OSError, ValueError):
        return  # there is no card that vlm can read
    card = old
    for name, section in new.sections.items():
        if name in old.sections:
            card = card.with_section(name, section)
    if not old.own_text and old.sections.keys() <= new.sections.keys():
        card = Card(card.metadata, new.body)
    text = str(ModelCardData(ignore_metadata_errors=True, **{**new.metadata, **old.metadata}).to_yaml())
    (out / CARD_FILE).write_text(f"---\n{text}\n---\n\n{card.body.strip()}\n", encoding="utf-8")


def read_story(source: Path, model: VLM) -> str | None:
    """Return the sentences of a model card on how the model was trained; None if its directory has no whole record."""
    try:
        result: dict[str, Any] = read_json(source / RUN_FILE)["result"]
        steps, records = int(result["steps"]), int(result["records"])
        losses = {key: None if result.get(key) is None else float(result[key]) for key in ("loss", "eval_loss")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return training_story(model, steps=steps, records=records, **losses)
