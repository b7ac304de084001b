"""The file of a sweep: YAML, with paths that start at its folder. A sweep copies its own into its results."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from vlm_cli.data.sources.hub import HUB
from vlm_cli.errors import UsageError
from vlm_cli.lookalike import find_named
from vlm_cli.plain_data import COMPOSITION_BYTES, parse_yaml, read_text
from vlm_cli.sweeps.plan import MADE

__all__ = ["dump_plan", "is_sweep_file", "read_plan_values"]

_PATHS = ("data", "eval_data", "image_folder", "media_root")
_PARTS = ("vision_encoder", "language_model")
_NAMES = ("name", "tokenizer", "pretrained")  # settings of a part that may be paths
_LOCAL = "local-dir:"


def is_sweep_file(name: str) -> bool:
    """Tell whether a file describes a sweep: it has a key that no composition has."""
    try:
        data = parse_yaml(read_text(find_named(name), most_bytes=COMPOSITION_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and bool({"base", "set", "seeds"} & data.keys())


def read_plan_values(name: str) -> dict[str, Any]:
    """Read the values of a sweep's file; paths in it start at its folder.

    Raises:
        UsageError: if the file cannot be read, or holds no mapping.
    """
    path = find_named(name)
    try:
        data = parse_yaml(read_text(path, most_bytes=COMPOSITION_BYTES))
    except OSError as error:
        raise UsageError(f"cannot read the sweep {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"the sweep {str(path)!r} is not valid: {error}.") from None
    if not isinstance(data, dict):
        raise UsageError(f"the sweep {str(path)!r} must hold a mapping of options to values.")

    def place(text: str) -> str:
        return os.path.normpath(path.parent / text) if (path.parent / text).exists() else text

    return move_paths(data, place, always=lambda text: os.path.normpath(path.parent / text))


def dump_plan(values: Mapping[str, Any], folder: Path) -> str:
    """Write values as the file of a sweep in a folder, from which its paths start."""

    def place(text: str) -> str:
        return os.path.relpath(text, folder) if os.path.exists(text) else text

    return yaml.safe_dump(move_paths(values, place, always=lambda text: os.path.relpath(text, folder)), sort_keys=False)


def move_paths(
    values: Mapping[str, Any], place: Callable[[str], str], *, always: Callable[[str], str]
) -> dict[str, Any]:
    """Return values in which each path is replaced.

    Args:
        values: of a sweep.
        place: what becomes of a text that may be a path, as the name of a part.
        always: what becomes of a path.
    """
    moved = dict(values)
    for key in _PATHS:
        given = values.get(key)
        if isinstance(given, str):
            moved[key] = given if given.startswith(HUB) else always(given)
        elif isinstance(given, list):
            moved[key] = [x if not isinstance(x, str) or x.startswith(HUB) else always(x) for x in given]
    base = values.get("base")
    if isinstance(base, str):
        moved["base"] = place(base)
    elif isinstance(base, Mapping):
        moved["base"] = {key: _move_part(x, place) if key in _PARTS else x for key, x in base.items()}
    if isinstance(values.get("set"), Mapping):
        moved["set"] = {name: _move_values(name, x, place) for name, x in values["set"].items()}
    made = values.get(MADE)
    if isinstance(made, Mapping) and isinstance(made.get("inputs"), Mapping):
        moved[MADE] = {**made, "inputs": {place(str(name)): x for name, x in made["inputs"].items()}}
    return moved


def _move_values(name: str, values: Any, place: Callable[[str], str]) -> Any:
    part, _, setting = str(name).replace("-", "_").partition(".")
    if part not in _PARTS or (setting and setting not in _NAMES):
        return values
    return [_move_part(x, place) for x in values] if isinstance(values, list) else _move_part(values, place)


def _move_part(value: Any, place: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _move_part(x, place) if key in _NAMES else x for key, x in value.items()}
    if isinstance(value, list):
        return [_move_part(x, place) for x in value]
    if not isinstance(value, str) or not value:
        return value
    return _LOCAL + place(value.removeprefix(_LOCAL)) if value.startswith(_LOCAL) else place(value)
