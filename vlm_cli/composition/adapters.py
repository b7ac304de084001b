"""Adapters: a part stays as it is, and small matrices beside its linear layers train (LoRA, DoRA, rsLoRA).

    parse_adapter("language_model:r=16,alpha=32,targets=q_proj+v_proj")  # the value of --lora

Sources: LoRA (https://arxiv.org/abs/2106.09685), DoRA (https://arxiv.org/abs/2402.09353), rsLoRA
(https://arxiv.org/abs/2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_cli.composition.options import PARTS
from vlm_cli.errors import UsageError
from vlm_cli.registry import suggest
from vlm_cli.schema import show

__all__ = ["ADAPTABLE_PARTS", "MAX_RANK", "AdapterSettings", "parse_adapter", "parse_adapters"]

#: Parts that an adapter can be beside. Added tokens are few rows of two tables, which train as they are.
ADAPTABLE_PARTS = tuple(part for part in PARTS if part != "added_tokens")

MAX_RANK = 65_536

_EXAMPLE = "--lora language_model:r=16,alpha=32,targets=q_proj+v_proj,dropout=0.05"


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The adapter of one part: the layer W becomes W + alpha/r · B·A.

    Attributes:
        r: rows of A and columns of B.
        alpha: how much the adapter counts; None takes 2·r.
        targets: names of layers, or ends of names after a dot; none takes every linear layer but a language model's
            head.
        dropout: share of the adapter's inputs that are dropped in training.
        dora: train the length of each row of W apart from its direction (DoRA).
        rslora: divide by the square root of r, not by r (rsLoRA).

    Raises:
        UsageError: listing every value that is not possible.
    """

    r: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.r <= MAX_RANK:
            problems.append(f"r must be a whole number from 1 to {MAX_RANK:,}, got {show(self.r)}.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and 0 < self.alpha <= 1e6):
            problems.append(f"alpha must be above 0 and at most 1,000,000, got {show(self.alpha)}.")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be from 0 to below 1, got {show(self.dropout)}.")
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def scale(self) -> float:
        """What `alpha` is, or is by default."""
        return float(2 * self.r if self.alpha is None else self.alpha)


def parse_adapters(texts: Sequence[str], trained: Sequence[str] = ()) -> dict[str, AdapterSettings]:
    """Read all values of `--lora`: part -> its adapter.

    Args:
        texts: as the user typed them.
        trained: parts of which the user said that they train whole.

    Raises:
        UsageError: for a value that cannot be read, two adapters of a part, or one of a part that trains whole.
    """
    found: dict[str, AdapterSettings] = {}
    for text in texts:
        part, settings = parse_adapter(text)
        if part in found:
            raise UsageError(f"--lora is given twice for {part}. Give one, with all of its settings: {_EXAMPLE}")
        if part in trained:
            others = ",".join(x for x in trained if x != part) or "none"
            raise UsageError(
                f"{part} cannot train whole and through an adapter. Leave out --lora {part}, or name only the other "
                f"parts: --trainable {others}"
            )
        found[part] = settings
    return found


def parse_adapter(text: str) -> tuple[str, AdapterSettings]:
    """Read a value of `--lora`: a part, and after a colon its settings.

    >>> parse_adapter("fusion:r=4,dora")
    ('fusion', AdapterSettings(r=4, alpha=None, targets=(), dropout=0.0, dora=True, rslora=False))

    Raises:
        UsageError: saying what is possible.
    """
    name, _, rest = text.partition(":")
    part = name.strip().replace("-", "_")
    if part == "added_tokens":
        raise UsageError("added_tokens has no layers for an adapter. Train it whole: --trainable added_tokens,…")
    if part not in ADAPTABLE_PARTS:
        raise UsageError(
            f"unknown part {part!r} in --lora {text!r}.{suggest(part, ADAPTABLE_PARTS)} Known: "
            f"{', '.join(ADAPTABLE_PARTS)}. Example: {_EXAMPLE}"
        )
    values: dict[str, Any] = {}
    for item in filter(None, (x.strip() for x in rest.split(","))):
        key, equals, value = (x.strip() for x in item.partition("="))
        if key not in _READERS:
            raise UsageError(_unknown(key, text))
        if key in values:
            raise UsageError(f"--lora {text!r} gives {key} twice. To name several layers: targets=q_proj+v_proj")
        try:
            values[key] = _READERS[key](value if equals else "true" if key in ("dora", "rslora") else "")
        except ValueError:
            raise UsageError(f"{key} in --lora {text!r} must be {_WORDS[key]}, got {show(value)}.") from None
    return part, AdapterSettings(**values)


def _unknown(key: str, text: str) -> str:
    if key == "trainable_token_indices":
        return f"--lora {text!r}: the rows of added tokens train as a part of their own: --trainable added_tokens,…"
    return f"unknown setting {key!r} in --lora {text!r}.{suggest(key, _READERS)} Known: {', '.join(_READERS)}."


def _read_truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _read_targets(text: str) -> tuple[str, ...]:
    """Read names that the user joined by `+`; `all` names every linear layer."""
    names = tuple(x.strip() for x in text.split("+"))
    if not all(names):
        raise ValueError
    return () if names == ("all",) else names


_READERS: dict[str, Callable[[str], Any]] = {
    "r": int,
    "alpha": float,
    "targets": _read_targets,
    "dropout": float,
    "dora": _read_truth,
    "rslora": _read_truth,
}
_WORDS = {
    "r": "a whole number",
    "alpha": "a number",
    "targets": "all, or names of layers joined by +",
    "dropout": "a number",
    "dora": "true or false",
    "rslora": "true or false",
}
