"""Keep the weights of the best checkpoint of a run, beside the last ones from which it resumes.

OUT.checkpoints/best-500/model.safetensors    the weights of step 500; the log says how good they are
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError
from vlm_cli.files import flush_to_disk

__all__ = ["BestWeights"]

_LOSS, _SCORE = "eval_loss", "exact"  # keys of the log


class BestWeights:
    """The weights of the step with the lowest held-out loss, or with the most right answers.

    Of equal scores, the one with the lower loss counts, and then the earlier one.

    Args:
        folder: of the checkpoints.
        measure: "loss" or "score".
    """

    def __init__(self, folder: Path, measure: str) -> None:
        self.folder, self.measure = folder, measure

    def find_step(self, entries: Sequence[Mapping[str, Any]]) -> int | None:
        """Return the best step of a log; None if nothing was measured after step 0, whose weights nobody wrote."""
        key = _LOSS if self.measure == "loss" else _SCORE
        measured = [x for x in entries if x.get("step") and x.get(key) is not None]
        if not measured:
            return None

        def badness(entry: Mapping[str, Any]) -> tuple[float, float]:
            loss = float(entry.get(_LOSS, 0.0))
            return (loss, 0.0) if self.measure == "loss" else (-float(entry[_SCORE]), loss)

        return int(min(measured, key=badness)["step"])

    def keep(self, checkpoint: Path, step: int, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keep the weights of a complete checkpoint if they are the best so far.

        Raises:
            CheckpointError: if they cannot be written.
        """
        wanted = self._place(step)
        if self.find_step(entries) != step or wanted.exists():
            return
        partial = self.folder / ".best"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(checkpoint, partial, copy_function=_link, ignore=_only_weights)
            flush_to_disk(partial)
            os.rename(partial, wanted)
        except OSError as error:
            raise CheckpointError(f"cannot keep the best weights in {str(wanted)!r}: {error.strerror}.") from None
        for old in self.folder.glob("best-*"):
            if old != wanted:
                shutil.rmtree(old, ignore_errors=True)

    def find(self, entries: Sequence[Mapping[str, Any]]) -> Path | None:
        """Return the folder with the best weights; None if they are those of no checkpoint."""
        step = self.find_step(entries)
        return None if step is None or not self._place(step).is_dir() else self._place(step)

    def _place(self, step: int) -> Path:
        return self.folder / f"best-{step}"


def _link(source: str, target: str) -> None:
    """Give a file a second name, which costs no space; copy it where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _only_weights(folder: str, names: list[str]) -> list[str]:
    """Leave out what a run needs only to go on."""
    return [name for name in names if not name.endswith((".safetensors", ".json")) or name == "trainer_state.json"]
