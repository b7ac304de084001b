"""Compositions and records for the tests of training, and how to read what a run wrote."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
SIZE = 32  # pixels

#: One layer and four patches: training runs many steps, and its records are measured against a short context.
TRAINING_TOWER = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3},
}
CROSS_ATTENTION = {
    "vision_tokenizer": {"type": "perceiver", "depth": 1, "num_heads": 2, "head_dim": 16, "num_latents": 4},
    "fusion": {"type": "cross-attention", "num_heads": 2, "head_dim": 16, "every": 2},
    "added_tokens": [END_OF_CHUNK, MEDIA_TOKEN],
    "trainable": ["vision_tokenizer", "fusion", "added_tokens"],
    "weight_decay": 0.1,
    "weight_decay_on": ["fusion"],
}
LANGUAGE_STREAM = {
    "vision_tokenizer": {"type": "linear"},
    "fusion": {"type": "language-stream"},
    "added_tokens": [MEDIA_TOKEN],
    "trainable": ["vision_tokenizer", "added_tokens", "language_model"],
    "weight_decay": 0.01,
}


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """The loss at each step that was logged."""
    return {entry["step"]: entry["loss"] for entry in metrics(folder) if "loss" in entry}


def interrupt_at(monkeypatch: Any, step: int, times: int = 1, *, run: int = 1) -> None:
    """Press Ctrl-C while a step of the `run`-th run of this process is under way."""
    from vlm_cli.training.trainer import VLMTrainer

    compute = VLMTrainer.compute_loss
    runs: list[Any] = []

    def press(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self not in runs:
            runs.append(self)
        if self.state.global_step + 1 == step and runs.index(self) + 1 == run:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "compute_loss", press)


def write_pictures_and_records(folder: Path) -> Path:
    """Pictures, and 24 records about them in `train.jsonl`."""
    records: list[dict[str, Any]] = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (SIZE, SIZE), colour).save(folder / f"{name}.png")
        prompt = f"<image:{name}.png>"
        records += [
            {"prompt": f"{prompt}Caption:", "completion": f" A {name} square.", "id": f"caption-{name}"},
            {"prompt": f"{prompt}Q: What colour? A:", "completion": f" {name}"},
            {
                "prompt": prompt,
                "turns": [
                    {"prompt": "Q: What colour? A:", "completion": f" {name}"},
                    {"prompt": " Q: A circle? A:", "completion": " no"},
                ],
            },
        ]
    write(folder / "train.jsonl", [*records, *records])
    return folder
