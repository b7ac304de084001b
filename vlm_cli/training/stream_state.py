"""The file of a checkpoint that says where each process's stream is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError
from vlm_cli.plain_data import read_json
from vlm_cli.training.checkpoints import reading

__all__ = ["read_stream_state", "write_stream_states"]

STREAM_FILE = "stream.json"


def write_stream_states(checkpoint: Path, states: Sequence[dict[str, Any]]) -> None:
    """Write the state of each process's stream into the directory of a checkpoint."""
    (checkpoint / STREAM_FILE).write_text(json.dumps({"processes": list(states)}), encoding="utf-8")


def read_stream_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Read the state of one process's stream.

    Raises:
        CheckpointError: if the file is missing, damaged, or of another number of processes.
    """
    with reading(checkpoint):
        states = read_json(checkpoint / STREAM_FILE)["processes"]
    if rank >= len(states):
        raise CheckpointError(f"{str(checkpoint)!r} is of {len(states)} processes. Start as many again.")
    state: dict[str, Any] = states[rank]
    return state
