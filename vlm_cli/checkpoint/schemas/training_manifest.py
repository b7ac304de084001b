"""The manifest of a checkpoint of `vlm train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_cli.schema import ANYTHING, Kind, check, mapping, mapping_of, number, optional, whole

__all__ = ["check_training_manifest"]

_LOSS = Kind("a number", lambda value: type(value) in (int, float))  # a loss may be NaN
_TRAINING_MANIFEST = mapping(
    {
        "step": whole(0, 10**12),
        "seconds": number(0, 1e12),
        "images": whole(0, 10**15),
        "run": mapping_of(ANYTHING),
    },
    {"unlogged": optional(mapping({"last_logged": whole(0, 10**12), "total": _LOSS}))},
)


def check_training_manifest(data: Any, file: Path) -> None:
    """Check the manifest of a checkpoint of `vlm train`.

    Raises:
        CheckpointError: naming the key.
    """
    check(data, _TRAINING_MANIFEST, repr(str(file)))
