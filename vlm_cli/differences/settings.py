"""Settings that differ: nested plain data, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Change", "find_changes"]


@dataclass(frozen=True)
class Change:
    """A setting that differs.

    Attributes:
        key: dotted name.
        a, b: what each side has; None where it has nothing of this name.
    """

    key: str
    a: Any
    b: Any

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_changes(a: Any, b: Any) -> list[Change]:
    """Compare two pieces of nested plain data; keys in the order of the first, then those of the second alone.

    >>> find_changes({"x": {"y": 1}, "z": [1]}, {"x": {"y": 2}, "z": [1], "w": None, "v": 0})
    [Change(key='x.y', a=1, b=2), Change(key='v', a=None, b=0)]
    """
    left, right = dict(_flatten(a)), dict(_flatten(b))
    keys = dict.fromkeys([*left, *right])
    return [Change(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def _flatten(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        items = [(str(key), x) for key, x in data.items()]
    elif isinstance(data, (list, tuple)) and any(isinstance(x, Mapping) for x in data):
        items = [(str(i), x) for i, x in enumerate(data, 1)]
    else:
        yield prefix, [*data] if isinstance(data, tuple) else data
        return
    for key, x in items:
        yield from _flatten(x, f"{prefix}.{key}" if prefix else key)
