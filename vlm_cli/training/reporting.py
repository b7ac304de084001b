"""Send measurements to TensorBoard, Weights & Biases and Trackio, through Transformers' callbacks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from vlm_cli.errors import UsageError

__all__ = ["RUNS_FOLDER", "check_reporters", "make_reporters"]

RUNS_FOLDER = "runs"  # of TensorBoard's files, in the folder of the checkpoints and then in the output

_INSTALL = {"tensorboard": "'vlm-cli[tensorboard]'", "wandb": "'vlm-cli[wandb]'", "trackio": "trackio"}


def check_reporters(names: Sequence[str] | None) -> None:
    """Check that the packages are installed.

    Raises:
        UsageError: naming what to install.
    """
    for name in names or ():
        if find_spec(name) is None:
            raise UsageError(f"--report-to {name} needs the package {name}: pip install {_INSTALL[name]}")


def make_reporters(names: Sequence[str] | None, folder: Path) -> list[TrainerCallback]:
    """Make the callbacks that send what a run measures.

    Args:
        names: of the programs.
        folder: holds TensorBoard's files, unless the variable TENSORBOARD_LOGGING_DIR names another.
    """
    made: list[TrainerCallback] = []
    for name in names or ():
        if name == "tensorboard":
            board = TensorBoardCallback()
            board.logging_dir = board.logging_dir or str(folder / RUNS_FOLDER)
            made.append(board)
        elif name == "wandb":
            os.environ.setdefault("WANDB_PROJECT", "vlm")
            made += [WandbCallback(), _FinishWandb()]
        else:
            made.append(TrackioCallback())
    return made


class _FinishWandb(TrainerCallback):
    """End the run of Weights & Biases when training ends, so that the next stage is a run of its own."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import wandb

        if state.is_world_process_zero:
            wandb.finish()
