"""Judge a model of half precision also in float32, on the same weights.

In bfloat16, a difference of 1.0 between logits may be rounding, and then nobody sees an error of 0.9. The same weights
in float32 show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from vlm_cli.doctor.check import Check
from vlm_cli.doctor.finding import Finding
from vlm_cli.doctor.judge import judge
from vlm_cli.doctor.subject import BareLanguageModel, WholeModel

__all__ = ["judge_in_both"]

_HALF = (torch.bfloat16, torch.float16)


def judge_in_both(check: Check, subject: WholeModel, bare: Sequence[BareLanguageModel]) -> Finding:
    """Run a check in the model's dtype and, if that is of half precision, in float32; return the stricter finding.

    Args:
        check: what to measure.
        subject: the model under examination.
        bare: its bare language model, once per seed.
    """
    model = subject.model
    found = judge(check, subject, bare)
    if check.exact or found.twin is None or found.difference is None or not math.isfinite(found.difference):
        return found
    dtype = str(model.dtype).removeprefix("torch.")
    if model.dtype not in _HALF:
        return found
    if not _has_room(model):
        note = f"{dtype} lets no difference below {found.allowed:.1e} be seen, and memory is too small for float32"
        return replace(found, note=f"{found.note}. {note}".strip(". "))
    with _in_float32(model):
        exact = judge(check, subject, bare)
    native = f"in {dtype} the two ways differ by {found.difference:.1e}, and {found.allowed:.1e} is allowed"
    if exact.verdict == "holds" and found.verdict != "holds":
        return replace(exact, verdict="limit", note=f"{native}; in float32 the same weights agree, so this is rounding")
    return replace(exact, note=f"in float32, on the same weights; {native}. {exact.note}".strip(". "))


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [x for x in (*model.parameters(), *model.buffers()) if x.dtype in _HALF]


def _has_room(model: nn.Module) -> bool:
    """Tell whether memory suffices for weights of twice the bytes, and half as much again for activations."""
    import psutil

    more = 3 * sum(x.numel() for x in _tensors(model))
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return bool(more <= free)


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Hold the weights in float32 inside the block. Float32 holds every half number, so they come back to the bit."""
    before = [(x, x.dtype) for x in _tensors(model)]
    try:
        for x, _ in before:
            x.data = x.data.float()
        yield
    finally:
        for x, dtype in before:
            x.data = x.data.to(dtype)
