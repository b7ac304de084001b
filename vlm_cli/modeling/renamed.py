"""Names of the plugin contract until 0.1, which fusions and vision tokenizers of other packages may still use."""

from __future__ import annotations

from typing import Any

__all__ = ["RENAMED_HOOKS", "accept_old_hooks", "encodes_media_independently"]

#: Old name of a fusion's method -> its name now.
RENAMED_HOOKS = {
    "_at_call": "condition_call",
    "_build_fusion": "build_fusion",
    "_embed_media": "embed_media",
    "positions_of_medium": "num_positions_of",
    "positions_per_medium": "num_positions",
    "prepare_media": "project_media",
    "spread": "expand_prompt",
}


def accept_old_hooks(fusion: type) -> None:
    """Give each method that a class defines under one of its two names the other name too.

    A class that defines `_embed_media` then has `embed_media`, which the model calls; and a class below it that calls
    `super()._embed_media(…)` finds it, also where the class above defines `embed_media`.
    """
    for old, new in RENAMED_HOOKS.items():
        own = vars(fusion)
        if new in own and old not in own:
            setattr(fusion, old, own[new])
        elif old in own and new not in own:
            setattr(fusion, new, own[old])


def encodes_media_independently(tokenizer: Any) -> bool:
    """Say whether a vision tokenizer declares that a medium's tokens depend on nothing else in its row."""
    names = ("encodes_media_independently", "reads_media_apart")  # the second until 0.1
    return next((bool(getattr(tokenizer, name)) for name in names if hasattr(tokenizer, name)), False)
