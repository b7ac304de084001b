"""What a sweep varies: `NAME=VALUE,VALUE` becomes a dimension, and all dimensions together a grid.

Plain data: nothing here imports torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_cli.errors import UsageError
from vlm_cli.plain_data import parse_yaml
from vlm_cli.schema import show

__all__ = ["TRAINING", "Dimension", "Values", "describe_value", "make_dimension", "make_grid", "parse_dimension"]

MOST_VALUES = 100  # of a dimension
MOST_POINTS = 1_000  # of a grid
TRAINING = "train"  # `train.learning_rate` is a setting of `vlm train`, all others are of the composition
_OPEN, _CLOSE, _QUOTES = "[{(", "]})", "\"'"

#: The values of one point of the grid: name of the dimension -> value.
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Dimension:
    """A setting, and the values that it has in turn.

    Attributes:
        name: of a part, of its setting or of another key of a composition, or `train.NAME`.
        values: at least one; one alone is the same everywhere.
    """

    name: str
    values: tuple[Any, ...]

    @property
    def varies(self) -> bool:
        """Whether the runs differ in it."""
        return len(self.values) > 1


def parse_dimension(text: str) -> Dimension:
    """Read `NAME=VALUE,VALUE`. A value is YAML; a comma inside of brackets or quotes separates nothing.

    >>> parse_dimension("vision_tokenizer=linear,{type: perceiver, depth: 2}").values
    ('linear', {'type': 'perceiver', 'depth': 2})
    >>> parse_dimension("fusion.every=1,2")
    Dimension(name='fusion.every', values=(1, 2))

    Raises:
        UsageError: saying what is wrong.
    """
    name, equals, rest = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(
            f"--set expects NAME=VALUE,VALUE, got {text!r}. Example: --set vision_tokenizer=linear,perceiver"
        )
    values = []
    for word in _split(rest):
        if not word.strip():
            raise UsageError(f"--set {text!r} holds an empty value. Write a value between two commas.")
        try:
            values.append(parse_yaml(word))
        except ValueError as error:
            raise UsageError(f"the value {word.strip()!r} of --set {name.strip()} is not YAML: {error}.") from None
    return make_dimension(name, values)


def make_dimension(name: str, values: Sequence[Any]) -> Dimension:
    """Make a dimension of a name and its values.

    Raises:
        UsageError: if the name can be none of a setting, or a value stands there twice.
    """
    name = name.strip().replace("-", "_")
    keys = name.split(".")
    if not all(keys) or len(keys) > 2:
        raise UsageError(f"--set expects NAME or PART.SETTING before the =, got {name!r}.")
    if not 0 < len(values) <= MOST_VALUES:
        raise UsageError(f"--set {name} gives {len(values):,} values; 1 to {MOST_VALUES} are possible.")
    texts = [json.dumps(x, sort_keys=True, default=str) for x in values]
    if twice := next((x for x, y in zip(values, texts, strict=True) if texts.count(y) > 1), None):
        raise UsageError(
            f"--set {name} names the value {show(twice)} twice, which would be the same run. Give it once."
        )
    return Dimension(name, tuple(values))


def make_grid(dimensions: Sequence[Dimension]) -> list[Values]:
    """Return the values of each point; those of the last dimension change fastest.

    Raises:
        UsageError: if a setting has two dimensions, or the points are too many.
    """
    names = [x.name for x in dimensions]
    if twice := next((x for x in names if names.count(x) > 1), None):
        raise UsageError(f"--set names {twice} twice. Give all of its values at once: --set {twice}=X,Y")
    count = 1
    for x in dimensions:
        count *= len(x.values)
    if count > MOST_POINTS:
        raise UsageError(f"the values of --set make {count:,} compositions; {MOST_POINTS:,} are possible.")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(x.values for x in dimensions))]


def as_layers(values: Values) -> Iterator[dict[str, Any]]:
    """Yield the layers that bring values into a composition: parts before their settings, as a new part drops them."""
    for name, value in sorted(values.items(), key=lambda x: "." in x[0]):
        first, _, setting = name.partition(".")
        if first != TRAINING:
            yield {first: {setting: value} if setting else value}


def training_values(values: Values) -> dict[str, Any]:
    """Return the values that are settings of `vlm train`, by their names there."""
    return {name.partition(".")[2]: x for name, x in values.items() if name.partition(".")[0] == TRAINING}


def describe_value(value: Any) -> str:
    """Write a value in few characters.

    >>> describe_value({"type": "perceiver", "depth": 2}), describe_value(["fusion", "added_tokens"])
    ('perceiver(depth=2)', 'fusion+added_tokens')
    """
    if isinstance(value, Mapping):
        name = value.get("type", value.get("name", ""))
        rest = ", ".join(f"{k}={describe_value(x)}" for k, x in value.items() if k not in ("type", "name"))
        return f"{name}({rest})" if rest else str(name)
    if isinstance(value, (list, tuple)):
        return "+".join(map(describe_value, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES:
            quote = character
        elif character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        if character == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
