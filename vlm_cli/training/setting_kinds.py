"""What a file may hold for each setting of `vlm train`. Plain data: nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_origin

from vlm_cli.flags import OTHERS, Setting
from vlm_cli.schema import Kind, choice, either, list_of, mapping_of, number, text, truth, whole

__all__ = ["kind_of", "plain_settings"]

_LARGEST = 10**12  # that a number of a file may be; `TrainingSettings` says what a setting may be


def plain_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as the settings have them: lists as tuples, names of parts with underscores."""
    return {key: tuple(name.replace("-", "_") for name in x) if isinstance(x, list) else x for key, x in values.items()}


def kind_of(setting: Setting) -> Kind:
    """Return what a file may hold for a setting; `TrainingSettings` then checks ranges."""
    kind = setting.type
    if setting.choices:
        return choice(*setting.choices)
    if setting.flag.per:
        one = number(0, _LARGEST)
        return either(one, mapping_of(one, keys=(*setting.flag.per, OTHERS)))
    if get_origin(kind) is Mapping:
        return mapping_of(either(number(-_LARGEST, _LARGEST), text()))
    if get_origin(kind) is tuple:
        return list_of(text(), most=100)
    return {bool: truth(), int: whole(-_LARGEST, _LARGEST), float: number(-_LARGEST, _LARGEST)}.get(kind, text())
