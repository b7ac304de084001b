"""Which tokens end an answer."""

from __future__ import annotations

from typing import Any

__all__ = ["stop_token_ids"]


def stop_token_ids(*sources: Any) -> tuple[int, ...]:
    """Return the ids that end an answer, each once, in the order of the sources.

    Args:
        sources: configurations or tokenizers; `eos_token_id` of each may be absent, None, one id or several.
    """
    found: dict[int, None] = {}
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found |= dict.fromkeys(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return tuple(found)
