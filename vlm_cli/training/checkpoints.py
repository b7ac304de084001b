"""Checkpoints of a run, in a folder beside its output: whole, or not there.

    demo/                      the output, which appears at the end
    demo.checkpoints/
        metrics.jsonl
        checkpoint-500/        complete: it holds `complete.json`
        .partial/              being written; removed by the next run

A checkpoint holds the parts that train, the optimizer and the state of the random numbers; the other parts are in the
model that the run began with.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError, UsageError, first_line
from vlm_cli.files import flush_to_disk

__all__ = ["MARK", "Checkpoint", "Checkpoints", "folder_of"]

MARK = "complete.json"
_PARTIAL = ".partial"


def folder_of(out: Path) -> Path:
    """Where the checkpoints of `out` are kept."""
    return out.with_name(f"{out.name}.checkpoints")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its directory.
        step: steps that are done.
        seconds: of training so far.
        images: seen so far.
        run: what must not change when the run goes on.
    """

    path: Path
    step: int
    seconds: float
    images: int
    run: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: where they are; need not exist.
        keep: how many of the latest are kept.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Checkpoint]:
        """The complete ones, oldest first."""
        found = []
        for path in self.folder.glob("checkpoint-*"):
            try:
                data = json.loads((path / MARK).read_text(encoding="utf-8"))
                found.append(Checkpoint(path, **data))
            except (OSError, ValueError, TypeError):
                continue
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def last(self) -> Checkpoint | None:
        return next(reversed(self.all()), None)

    def clean(self) -> list[Path]:
        """Remove what was not completed, and say what."""
        whole = {checkpoint.path for checkpoint in self.all()}
        broken = [path for path in self.folder.glob("checkpoint-*") if path not in whole]
        broken += [path for path in [self.folder / _PARTIAL] if path.exists()]
        for path in broken:
            shutil.rmtree(path, ignore_errors=True)
        return broken

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder for a checkpoint's files, which `complete` then puts in its place.

        Raises:
            CheckpointError: if the files cannot be written. Older checkpoints stay.
        """
        from safetensors import SafetensorError

        partial = self.folder / _PARTIAL
        try:
            yield partial
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk has all of these names
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(self._cannot_write(step, error)) from error

    def _cannot_write(self, step: int, error: BaseException) -> str:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        last = self.last()
        kept = (
            "No earlier one is there."
            if last is None
            else f"The last complete one is {str(last.path)!r}. Make room, then repeat the command with --resume."
        )
        return f"cannot write the checkpoint of step {step}: {reason}. {kept}"

    def complete(self, written: Path, mark: Mapping[str, Any]) -> Checkpoint:
        """Mark a checkpoint whose files are all written, put it in its place, and remove the oldest ones."""
        path = self.folder / written.name
        (written / MARK).write_text(json.dumps(mark), encoding="utf-8")
        for file in written.rglob("*"):
            flush_to_disk(file)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(written, path)
        shutil.rmtree(written.parent, ignore_errors=True)
        flush_to_disk(self.folder)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old.path, ignore_errors=True)
        return Checkpoint(path, **mark)


def check_same_run(checkpoint: Checkpoint, run: Mapping[str, Any]) -> None:
    """
    Raises:
        UsageError: naming everything that differs between a checkpoint's run and this one.
    """
    differ = [key for key in run if checkpoint.run.get(key) != run[key]]
    if differ:
        lines = [f"  {key}: was {checkpoint.run.get(key)!r}, is {run[key]!r}" for key in differ]
        raise UsageError(
            f"{str(checkpoint.path)!r} belongs to another run, so that --resume cannot go on with it:\n"
            + "\n".join(lines)
            + "\nGive the same again, or start anew with --overwrite."
        )
