"""The checkpoints of an unfinished run, in a folder beside its output: each is complete, or is not counted.

    demo/                      the output, which appears at the end
    demo.checkpoints/
        metrics.jsonl
        checkpoint-500/        complete, because it holds `complete.json`
        .partial/              the run is writing it; the next run removes it

A checkpoint holds the parts that train, the optimizer and the state of the random numbers. The other parts are in the
model with which the run began.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from vlm_cli.checkpoint.schemas.training_manifest import check_training_manifest
from vlm_cli.checkpoint.torch_files import describe_load_error
from vlm_cli.errors import CheckpointError, VLMError, explain_reading, first_line
from vlm_cli.files import flush_to_disk
from vlm_cli.modeling.adapters import adapter_parameters
from vlm_cli.modeling.vlm import VLM
from vlm_cli.plain_data import read_json

__all__ = [
    "COMPLETE_FILE",
    "Checkpoints",
    "RunHistory",
    "TrainingCheckpoint",
    "UnloggedLosses",
    "checkpoint_folder",
    "reading",
    "select_trained",
]

COMPLETE_FILE = "complete.json"  # the last file of a checkpoint, written after all others
_PARTIAL = ".partial"
_FINISHED = "finished"  # holds the digest of the output's record of the run


def checkpoint_folder(out: Path) -> Path:
    """Return the folder that holds the checkpoints of the run whose output is `out`."""
    return out.with_name(f"{out.name}.checkpoints")


@dataclass(frozen=True)
class UnloggedLosses:
    """The losses of the steps since the last entry of the log. The next entry holds their mean.

    Attributes:
        last_logged: the step of that entry.
        total: sum of the losses of the steps after it.
    """

    last_logged: int
    total: float


@dataclass
class RunHistory(TrainerCallback, ExportableState):
    """The settings by which a run learns, and how they changed when it was resumed; each checkpoint holds them.

    Attributes:
        settings: options of this command.
        changes: for each resume with other settings, `step` and option -> [was, is].
    """

    settings: dict[str, Any]
    changes: list[dict[str, Any]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Return what Transformers writes to `trainer_state.json`."""
        return {"args": {}, "attributes": {"settings": self.settings, "changes": self.changes}}


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A complete checkpoint of a run.

    Attributes:
        path: its directory.
        step: steps that are done.
        seconds: seconds of training so far.
        images: images that the model has seen so far.
        run: what must be the same when the run is resumed.
        unlogged: losses that the next entry of the log continues; None if an entry was written at this step.
    """

    path: Path
    step: int
    seconds: float
    images: int
    run: dict[str, Any]
    unlogged: UnloggedLosses | None = None

    @property
    def history(self) -> RunHistory:
        """The settings of the command that wrote it; none if an earlier version of vlm wrote it."""
        try:
            kept = read_json(self.path / "trainer_state.json")["stateful_callbacks"][RunHistory.__name__]["attributes"]
            return RunHistory(dict(kept["settings"]), [dict(change) for change in kept["changes"]])
        except (OSError, ValueError, KeyError, TypeError):
            return RunHistory({})

    @classmethod
    def read(cls, path: Path) -> TrainingCheckpoint | None:
        """Read the manifest in a directory; None if the checkpoint is not complete.

        Raises:
            CheckpointError: if the manifest is whole, but does not hold what `complete` writes.
        """
        file = path / COMPLETE_FILE
        try:
            data = read_json(file)
        except (OSError, ValueError):
            return None
        check_training_manifest(data, file)
        unlogged = data.get("unlogged")
        return cls(
            path,
            **{key: data[key] for key in ("step", "seconds", "images", "run")},
            unlogged=None if unlogged is None else UnloggedLosses(unlogged["last_logged"], unlogged["total"]),
        )


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: the folder, which need not exist.
        keep: number of checkpoints that stay when a new one is complete; the oldest are removed.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[TrainingCheckpoint]:
        """List the complete checkpoints, the oldest first."""
        found = map(TrainingCheckpoint.read, self.folder.glob("checkpoint-*"))
        return sorted((x for x in found if x is not None), key=lambda checkpoint: checkpoint.step)

    def last(self) -> TrainingCheckpoint | None:
        """Return the newest complete checkpoint; None if there is none."""
        return next(reversed(self.all()), None)

    def clean(self) -> list[Path]:
        """Remove the checkpoints that are not complete, and return their paths."""
        whole = {checkpoint.path for checkpoint in self.all()}
        broken = [path for path in self.folder.glob("checkpoint-*") if path not in whole]
        broken += [path for path in [self.folder / _PARTIAL] if path.exists()]
        for path in broken:
            shutil.rmtree(path, ignore_errors=True)
        return broken

    def mark_finished(self, digest: str) -> None:
        """Note that the run has written its output, so that the folder may go even if the process dies now.

        Args:
            digest: of the record of the run in the output.
        """
        (self.folder / _FINISHED).write_text(digest)

    def is_finished(self, digest: str) -> bool:
        """Tell whether the run of these checkpoints wrote the output whose record has this digest."""
        try:
            return (self.folder / _FINISHED).read_text() == digest
        except (OSError, ValueError):
            return False

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Give a folder for the files of a checkpoint; `complete` then moves the checkpoint to its place.

        Raises:
            CheckpointError: if the files cannot be written. Older checkpoints stay.
        """
        from safetensors import SafetensorError

        partial = self.folder / _PARTIAL
        try:
            yield partial
        except (OSError, SafetensorError, RuntimeError) as error:  # each of them may mean that the disk is full
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(self._explain(step, error)) from error

    def complete(
        self,
        written: Path,
        *,
        step: int,
        seconds: float,
        images: int,
        run: Mapping[str, Any],
        unlogged: UnloggedLosses | None = None,
    ) -> None:
        """Write the manifest of a checkpoint, move the checkpoint to its place, and remove the oldest ones.

        Args:
            written: the directory, in which all other files are written.
            step: as in `TrainingCheckpoint`.
            seconds: as in `TrainingCheckpoint`.
            images: as in `TrainingCheckpoint`.
            run: as in `TrainingCheckpoint`.
            unlogged: as in `TrainingCheckpoint`.
        """
        manifest = {"step": step, "seconds": seconds, "images": images, "run": run}
        manifest |= {} if unlogged is None else {"unlogged": asdict(unlogged)}
        (written / COMPLETE_FILE).write_text(json.dumps(manifest), encoding="utf-8")
        for file in written.rglob("*"):
            flush_to_disk(file)
        path = self.folder / written.name
        shutil.rmtree(path, ignore_errors=True)
        os.rename(written, path)
        shutil.rmtree(written.parent, ignore_errors=True)
        flush_to_disk(self.folder)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old.path, ignore_errors=True)

    def _explain(self, step: int, error: BaseException) -> str:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        if "inline_container" in reason:  # of torch's writer of archives, which compares positions and loses the cause
            reason = "a file could not be written to its end, as on a full disk"
        last = self.last()
        kept = (
            "The run has no earlier checkpoint."
            if last is None
            else f"The last complete one is {str(last.path)!r}. Make room, then repeat the command with --resume."
        )
        return f"cannot write the checkpoint of step {step}: {reason}. {kept}"


@contextmanager
def reading(checkpoint: str | Path) -> Iterator[None]:
    """Turn any error inside the block, which reads the files of a checkpoint, into one that says what to do.

    Raises:
        CheckpointError: if a file is damaged, or holds code.
    """
    try:
        yield
    except VLMError:
        raise
    except Exception as error:
        why = explain_reading(error)
        if why == first_line(error):
            why = describe_load_error(error)
        raise CheckpointError(
            f"the checkpoint {str(checkpoint)!r} cannot be read: {why}. Delete its folder and repeat the command, "
            "which then resumes from the checkpoint before it."
        ) from error


def select_trained(model: VLM, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select from a state dict the tensors of the parts that train and of adapters; of tied tensors, only the first."""
    prefixes = (*model.trained_prefixes(), *(name for name, _ in adapter_parameters(model)))
    seen: set[int] = set()
    selected = {}
    for name, tensor in state.items():
        if name.startswith(prefixes) and (tensor.data_ptr() not in seen or not tensor.numel()):
            seen.add(tensor.data_ptr())
            selected[name] = tensor.contiguous()
    return selected
