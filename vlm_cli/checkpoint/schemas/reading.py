"""Read a JSON file of a directory or hub id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_cli.errors import CheckpointError
from vlm_cli.plain_data import read_json
from vlm_cli.schema import check, mapping

__all__ = ["check_is_mapping", "read_file"]


def check_is_mapping(name: str, file: str, **keywords: Any) -> None:
    """Check that a JSON file of a directory or hub id, if it exists, is JSON and holds a mapping.

    Raises:
        CheckpointError: naming the file.
    """
    read_file(name, file, keywords)


def read_file(name: str, file: str, keywords: Mapping[str, Any]) -> Any:
    """Read a JSON file of a directory or hub id; None if it has none.

    Raises:
        CheckpointError: if the file is no JSON.
    """
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        path = Path(name) / file if Path(name).is_dir() else cached_file(name, file, **quiet, **keywords)
    except OSError:  # no such repository or revision, which the loaders report
        return None
    if path is None or not Path(path).exists():
        return None
    try:
        data = read_json(Path(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {file} of {name!r}: {error.strerror}.") from None
    except ValueError as error:
        raise CheckpointError(f"{file} of {name!r} is not valid: {error}.") from None
    check(data, mapping({}), f"{file} of {name!r}")
    return data
