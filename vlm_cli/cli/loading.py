"""From what a user asked for to a model that is ready to answer."""

from __future__ import annotations

import gc

__all__ = ["keep_collecting"]


def keep_collecting() -> None:
    """Let Python collect garbage again, for a command that runs for long.

    `main` stops the collector, because a command that ends soon needs none. Objects that exist by now, such as the
    modules of torch, live until the end; the collector does not look at them again.
    """
    gc.freeze()
    gc.enable()
