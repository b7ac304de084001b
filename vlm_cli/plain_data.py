"""Read plain data, JSON and YAML, from files that somebody else may have written.

A few bytes of YAML can stand for gigabytes, and a few thousand brackets exceed Python's stack. So each reader limits
the bytes that it reads and what they may grow to, and raises `ValueError` with words for a user.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from vlm_cli.text import decode_text

__all__ = [
    "COMPOSITION_BYTES",
    "JSON_BYTES",
    "finite",
    "is_finite",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_text",
]

JSON_BYTES = 64 << 20  # a configuration has some kB, the index of a large model some MB
COMPOSITION_BYTES = 100_000  # a composition has about 1,000
_YAML_BRACKETS = 50  # one inside the other
_YAML_NODES = 10_000  # keys and values of a YAML text, after each alias is replaced by what it stands for

_TOO_DEEP = "its brackets are nested too deeply"
_TOO_LONG = "it holds a number or date that cannot be read"


def read_text(path: Path, *, most_bytes: int = JSON_BYTES) -> str:
    """Read a text file of limited size, or standard input if the path is `-`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger, or no UTF-8 text.
    """
    if str(path) == "-":
        data = b"" if sys.stdin is None else sys.stdin.buffer.read(most_bytes + 1)
    else:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes:,} bytes")
    try:
        return decode_text(data)
    except ValueError as error:
        raise ValueError(f"it is {error}") from None


def read_json(path: Path, *, most_bytes: int = JSON_BYTES) -> Any:
    """Read a JSON file of limited size.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger, or not JSON.
    """
    return parse_json(read_text(path, most_bytes=most_bytes))


def parse_json(text: str) -> Any:
    """Read JSON text.

    Raises:
        ValueError: if the text is not JSON; the message names line and character.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = error.msg[:1].lower() + error.msg[1:]
        raise ValueError(f"it is not JSON: line {error.lineno}, character {error.colno}: {message}") from None
    except ValueError:
        raise ValueError(_TOO_LONG) from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def finite(data: Any) -> Any:
    """Return plain data with null for each number that JSON cannot write: NaN and infinity.

    >>> finite({"loss": [1.5, float("nan")]})
    {'loss': [1.5, None]}
    """
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: finite(x) for key, x in data.items()}
    return [finite(x) for x in data] if isinstance(data, (list, tuple)) else data


def is_finite(data: Any) -> bool:
    """Tell whether JSON can write every number in plain data."""
    try:
        json.dumps(data, allow_nan=False)
    except ValueError:
        return False
    return True


def parse_yaml(text: str) -> Any:
    """Read YAML text.

    >>> parse_yaml("[1e-4, 0.1]")
    [0.0001, 0.1]

    Raises:
        ValueError: if the text is not YAML, or stands for more than 10,000 keys and values; the message names line and
            character.
    """
    import yaml

    if len(text) > COMPOSITION_BYTES:
        raise ValueError(f"it is larger than {COMPOSITION_BYTES:,} bytes")
    try:
        loader = _yaml_loader()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, character {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ValueError(where + problem) from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except _TooLarge as error:
        raise ValueError(str(error)) from None
    except (ValueError, OverflowError):  # Python's own, of a date that does not exist or a number of 5,000 digits
        raise ValueError(_TOO_LONG) from None


class _TooLarge(Exception):
    """A YAML text that stands for too much."""


def _check_nodes(root: Any) -> None:
    """Count the nodes that a YAML text stands for; a node counts each time that an alias names it.

    Raises:
        _TooLarge: if the text has too many, or one that holds itself.
    """
    sizes: dict[int, int] = {}

    def count(node: Any, above: frozenset[int]) -> int:
        if id(node) in above:
            raise _TooLarge("an alias stands inside the value that it names")
        if id(node) not in sizes:
            found = 1
            if not isinstance(node.value, str):
                inner = above | {id(node)}
                for child in node.value:
                    found += sum(count(x, inner) for x in (child if isinstance(child, tuple) else (child,)))
            sizes[id(node)] = found
        if sizes[id(node)] > _YAML_NODES:
            raise _TooLarge(f"it stands for more than {_YAML_NODES:,} keys and values")
        return sizes[id(node)]

    count(root, frozenset())


@functools.cache
def _yaml_loader() -> type[Any]:
    """PyYAML's safe loader, taught that 1e-4 is a number as in YAML 1.2 and JSON (to PyYAML alone it is text)."""
    import yaml

    class Loader(yaml.SafeLoader):
        def fetch_flow_collection_start(self, kind: Any) -> None:
            if self.flow_level >= _YAML_BRACKETS:
                raise _TooLarge(_TOO_DEEP)
            super().fetch_flow_collection_start(kind)

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader
