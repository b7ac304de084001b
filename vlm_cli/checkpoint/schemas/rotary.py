"""The settings of rotary position embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlm_cli.schema import Kind, choice, either, list_of, number

__all__ = ["BASE", "ROPE", "ROTARY_BASES"]

#: Names of the base of rotary position embeddings; a list has one base for each layer.
ROTARY_BASES = ("rope_theta", "global_rope_theta", "local_rope_theta", "rope_local_base_freq", "rotary_emb_base")
BASE = number(0, 1e15, above=True)
#: Numbers of a mapping of rotary position embeddings that divide or scale.
_ROPE_SCALES = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "original_max_position_embeddings",
    "short_factor",
    "long_factor",
)


def _find_rope_problems(data: Mapping[str, Any], key: str) -> Iterator[str]:
    """Check the settings of rotary position embeddings; some models have one such mapping for each kind of layer."""
    numbers = number(-1e15, 1e15)
    for name, value in data.items():
        place = f"{key}.{name}"
        if name in ("rope_type", "type"):
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            yield from choice("default", "mrope", *sorted(ROPE_INIT_FUNCTIONS)).find_problems(value, place)
        elif name == "rope_theta":
            yield from BASE.find_problems(value, place)
        elif name in _ROPE_SCALES and value is not None:
            yield from either(BASE, list_of(BASE)).find_problems(value, place)
        elif name == "partial_rotary_factor" and value is not None:
            yield from number(0, 1, above=True).find_problems(value, place)
        elif isinstance(value, Mapping):
            yield from _find_rope_problems(value, place)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield from numbers.find_problems(value, place)


ROPE = Kind("a mapping of keys to values", lambda x: isinstance(x, Mapping), _find_rope_problems)
