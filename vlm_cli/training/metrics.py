"""The measurements of a run: losses, learning rate and speed, in memory and in `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError
from vlm_cli.plain_data import finite

__all__ = ["METRICS_FILE", "MetricsLog"]

METRICS_FILE = "metrics.jsonl"

#: Keys of an entry in the file, in this order. An entry has `loss` or `eval_loss`.
_KEYS = (
    *("step", "epoch", "loss", "eval_loss", "exact", "examined", "learning_rate", "grad_norm", "images"),
    *("images_per_second", "tokens_per_second", "flops_per_step", "flops_per_second", "utilisation"),
    *("memory", "seconds"),
)


class MetricsLog:
    """Keep the entries of a run, count images, and write each entry to a file.

    Args:
        path: the file.
        measure: tells the operations of steps; see `Operations.measure`.
        writes: whether this process writes the file; of several processes, only the main one does.

    Attributes:
        entries: all measurements so far, those before a resume included.
        images: images that the model has seen so far, repeats included.
        tokens: that the model has read since the start or the resume.
    """

    def __init__(self, path: Path, measure: Callable[..., dict[str, float]], *, writes: bool) -> None:
        self.path, self.measure, self.writes = path, measure, writes
        self.entries: list[dict[str, Any]] = []
        self.images, self.tokens = 0, 0
        # at the last entry with a speed
        self._step_logged, self._images_logged, self._tokens_logged, self._seconds_logged = 0, 0, 0, 0.0

    def append(self, values: Mapping[str, Any], *, seconds: float, training: float | None = None) -> dict[str, Any]:
        """Complete an entry by images, seconds and speed, and write it.

        Args:
            values: `step`, `epoch` and what was measured.
            seconds: seconds of training so far.
            training: those of them that are no pause for a checkpoint or held-out records; None if none is.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        entry = {**values, "images": self.images, "seconds": round(seconds, 2)}
        if "loss" in entry:
            training = seconds if training is None else training
            passed = max(training - self._seconds_logged, 1e-9)
            images, tokens = self.images - self._images_logged, self.tokens - self._tokens_logged
            entry["images_per_second"] = round(images / passed, 2)
            entry["tokens_per_second"] = round(tokens / passed, 1)
            entry |= self.measure(tokens, images, steps=entry["step"] - self._step_logged, seconds=passed)
            self._images_logged, self._tokens_logged, self._seconds_logged = self.images, self.tokens, training
            self._step_logged = entry["step"]
        self.entries.append(entry)
        if self.writes:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_format_entry(entry))
            except OSError as error:
                raise CheckpointError(f"cannot write {str(self.path)!r}: {error.strerror}.") from None
        return entry

    def restore(self, entries: Sequence[dict[str, Any]], *, step: int, images: int, seconds: float) -> None:
        """Go back to the state of a checkpoint: forget the entries that were written after it."""
        self.entries = list(entries)
        self.images = self._images_logged = images
        self._step_logged, self._seconds_logged = step, seconds
        if self.writes:
            self.path.write_text("".join(map(_format_entry, self.entries)), encoding="utf-8")

    @property
    def images_per_second(self) -> float:
        """The speed in the last entry that has a speed; 0 before the first."""
        return self.last("images_per_second") or 0.0

    def last(self, key: str) -> float | None:
        """Return the last measurement of this name; None if there is none."""
        return next((entry[key] for entry in reversed(self.entries) if key in entry), None)


def _format_entry(entry: Mapping[str, Any]) -> str:
    # `learning_rate/PART` stands in runs whose parts have rates of their own, `gates/KIND` in those that have gates.
    keys = [*_KEYS, *(key for key in entry if key.startswith(("learning_rate/", "gates/")))]
    return json.dumps(finite({key: entry[key] for key in keys if key in entry}), allow_nan=False) + "\n"
