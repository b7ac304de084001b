"""What a causal language model's `forward` takes and returns, and what its cache holds."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["LanguageModelInterface", "is_filled", "num_cached"]

#: Types whose first token has the position after that of padding, which is the id of the pad token. With a cache they
#: would count padding among the positions, so the caller numbers these.
_AFTER_PADDING = ("kosmos_2_text_model",)
#: Names of the cache in Transformers; they differ between language models and between releases.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state")


@dataclass(frozen=True)
class LanguageModelInterface:
    """Names by which one causal language model takes and returns things; read once from its `forward`.

    Attributes:
        arguments: of `forward`; "kwargs" if it takes any.
        cache_name: how `forward` calls the cache: "past_key_values", "cache", "cache_params" or "state".
        first_position: number of a row's first token among its positions.
    """

    arguments: frozenset[str]
    cache_name: str
    first_position: int = 0

    @classmethod
    def of(cls, lm: PreTrainedModel) -> LanguageModelInterface:
        """Read the interface of a language model from the signature of its `forward`."""
        arguments = frozenset(inspect.signature(lm.forward).parameters)
        first = lm.config.pad_token_id + 1 if lm.config.model_type in _AFTER_PADDING else 0
        return cls(arguments, next((name for name in _CACHE_NAMES if name in arguments), "past_key_values"), first)

    @property
    def cache_names(self) -> tuple[str, ...]:
        """Names that a cache has in Transformers."""
        return _CACHE_NAMES

    @property
    def takes_positions(self) -> bool:
        """Whether the caller may number the positions of tokens, so that padding may stand between them."""
        return "position_ids" in self.arguments

    def accepted(self, **kwargs: Any) -> dict[str, Any]:
        """Keep the arguments that `forward` takes.

        A `forward` with `**kwargs` takes any that is not None, except `position_ids` and `logits_to_keep`: a model
        that does not name these ignores them, or hands them on to a function that fails.
        """
        takes_any = "kwargs" in self.arguments
        if self.first_position and kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + self.first_position
        return {
            name: x
            for name, x in kwargs.items()
            if name in self.arguments
            or (takes_any and x is not None and name not in ("position_ids", "logits_to_keep"))
        }

    def call(self, lm: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Any:
        """Call the language model with int[B, T] ids and those of `kwargs` that its `forward` takes."""
        return lm(input_ids=ids, **self.accepted(**kwargs))

    def cache_in(self, output: Any) -> Any:
        """Return the cache among the outputs of `forward` or `generate`; None if there is none."""
        names = (self.cache_name, "past_key_values", "cache")
        return next((x for name in names if (x := getattr(output, name, None)) is not None), None)


def is_filled(cache: Any) -> bool:
    """Say whether a cache has read anything; generation begins with an empty one."""
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):  # rwkv's list of states, which its first call makes
        return True
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # a purely recurrent state
        found = cache.has_previous_state
        return bool(found() if callable(found) else found)


def num_cached(cache: Any) -> int:
    """Count the positions in a cache; a purely recurrent state has none, and its model reads no mask over them."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return 0
