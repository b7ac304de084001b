"""Whether the classes of Transformers' VLMs compute a language model as it does by itself.

They take the language model without its head, and put a head of their own on it: a plain linear map. Whether that gives
the same logits is measured, for the model's own configuration. No weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vlm_cli.checkpoint.published.layouts.hf_parts import NO_SETTINGS
from vlm_cli.modeling.language_model import find_tables
from vlm_cli.modeling.meta import SkipsFilling, meta_device
from vlm_cli.schema import show
from vlm_cli.trust import make_config, make_language_model

__all__ = ["HFLanguageModel", "compare_settings", "find_hf_language_model"]


@dataclass(frozen=True)
class HFLanguageModel:
    """A language model as the classes take it.

    Attributes:
        config: without its head, as plain data; None if it is no plain language model.
        problems: what the classes compute otherwise than the language model itself does.
    """

    config: Mapping[str, Any] | None
    problems: tuple[str, ...]


def find_hf_language_model(config: PreTrainedConfig) -> HFLanguageModel:
    """Find out what the classes make of a language model.

    They tie their head to a table of the name `embed_tokens`; one of another name is written beside the head.

    Args:
        config: of the language model.
    """
    with meta_device(), SkipsFilling():
        lm: Any = make_language_model(config)
    what, prefix = f"language_model is of type {config.model_type}", lm.base_model_prefix
    base: Any = getattr(lm, prefix, None)
    if not _is_of_text(base):
        return HFLanguageModel(
            None, (f"{what}, which is no plain language model with a head on it; the class has one.",)
        )
    found = {key: x for key, x in base.config.to_dict().items() if key not in NO_SETTINGS}
    if find_tables(lm)[0] != f"{prefix}.embed_tokens.weight":
        found["tie_word_embeddings"] = False
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        inside = "a bias in its head" if type(head) is nn.Linear else f"a {type(head).__name__} as its head"
        return HFLanguageModel(found, (f"{what}, with {inside}; the class has a plain linear map.",))
    if not _is_plain(lm):
        more = f"{what}, which scales or caps its logits; the class takes them as they leave the head."
        return HFLanguageModel(found, (more,))
    return HFLanguageModel(found, ())


def compare_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Say what a language model has other than the one that a class builds of its own settings.

    Args:
        ours: settings of the language model, with `model_type`.
        theirs: those of the class's.
    """
    one, other = (make_config(**x).to_dict() for x in (ours, theirs))
    return [
        f"language_model has {key} {show(x)}; the class has {show(other.get(key))}."
        for key, x in one.items()
        if key not in NO_SETTINGS and x != other.get(key)
    ]


def _is_of_text(base: Any) -> bool:
    """Say whether a model without its head is there, and reads nothing beside text."""
    return base is not None and base.config.get_text_config() is base.config


class _Hidden:
    """What stands for the output of a language model without its head: hidden states, and nothing else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def _is_plain(lm: Any) -> bool:
    """Give a language model's head known hidden states, and compare the logits with the head's own output.

    Args:
        lm: on the meta device; the head is replaced by a small one with numbers.
    """
    head = lm.get_output_embeddings()
    draw = torch.Generator().manual_seed(0)
    states = 100 * torch.randn(1, 3, head.in_features, generator=draw)  # large, as a cap would show
    small = nn.Linear(head.in_features, 5, bias=False, device="cpu")
    small.weight.copy_(torch.randn(5, head.in_features, generator=draw))
    lm.set_submodule(next(name for name, module in lm.named_modules() if module is head), small)
    base = getattr(lm, lm.base_model_prefix)
    for module in (base, getattr(base, "decoder", None)):  # OPT's head reads the decoder inside
        if isinstance(module, nn.Module):
            module.forward = lambda *args, **keywords: _Hidden(states)
    logits = lm.eval()(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits
    return torch.equal(logits, small(states))
