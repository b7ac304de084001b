"""How much memory this process has used."""

from __future__ import annotations

import sys

import torch

__all__ = ["peak_memory"]


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far, plus those on the accelerator if `device` is one."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
