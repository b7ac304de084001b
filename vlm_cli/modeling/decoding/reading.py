"""Prompts that the language model has read, before their first new tokens are chosen.

n rows, L positions of the language model, V columns of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlm_cli.modeling.decoding.steps import settle

__all__ = ["ReadPrompts", "read", "reading"]


@dataclass(frozen=True)
class ReadPrompts:
    """Prompts that the language model has read.

    Attributes:
        ids: int[n, L], padded at the left.
        logits: float[n, V] of the first new tokens.
        kwargs: of the first step, with the cache.
    """

    ids: Tensor
    logits: Tensor
    kwargs: dict[str, Any]


def read(model: Any, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> ReadPrompts:
    """Read prompts.

    Args:
        model: the VLM.
        ids: int[n, L].
        config: the settings of `generate`.
        kwargs: of `prepare_inputs_for_generation`.
    """
    outputs = model._prefill(ids, config, kwargs, is_first_iteration=True)
    logits = outputs.logits[:, -1].clone()  # the other positions' may be freed
    return ReadPrompts(ids, logits, settle(model, outputs, kwargs))


@contextmanager
def reading(model: Any) -> Iterator[list[ReadPrompts]]:
    """Let `model.generate` read prompts and write nothing."""
    found: list[ReadPrompts] = []
    model.read_prompts = found
    try:
        yield found
    finally:
        model.read_prompts = None
