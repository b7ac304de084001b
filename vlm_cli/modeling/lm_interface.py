"""What a causal language model's `forward` takes and returns."""

from __future__ import annotations

from typing import Any

__all__ = ["is_filled"]


def is_filled(cache: Any) -> bool:
    """Whether a cache has read anything; generation begins with an empty one."""
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):  # rwkv's list of states, which its first call makes
        return True
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # a purely recurrent state
        found = cache.has_previous_state
        return bool(found() if callable(found) else found)
