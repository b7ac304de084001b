"""Measure the weights of a built model, tensor by tensor (`vlm inspect --weights`)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from vlm_cli.checkpoint.beginnings import Beginning, Beginnings
from vlm_cli.checkpoint.stored import StoredModel, part_of
from vlm_cli.differences.opening import open_stored
from vlm_cli.report.weights import EXPLODING, TensorWeights, WeightReport, measure_tensor

__all__ = ["measure_weights"]


def measure_weights(
    model: StoredModel,
    *,
    times: float = EXPLODING,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WeightReport:
    """Measure each tensor of a model; no more than one pretrained part of it is in memory at once.

    Args:
        model: the model.
        times: a row explodes above this multiple of the median norm of its tensor's rows.
        trust_remote_code: whether the language model's own code may run.
        progress: called with the number of tensors that are done, and of all.

    Raises:
        VLMError: if a tensor cannot be read.
    """
    beginnings = Beginnings(
        model, lambda name: open_stored(name, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
    )
    tensors: list[TensorWeights] = []
    starts = {}
    for part, names in groupby(model.tensors, part_of):
        began = beginnings.find(part)
        starts[part] = {"place": began.place, "unknown": began.reason or None}
        for name in names:
            tensors.append(_measure(model, name, began, times))
            progress(len(tensors), len(model.tensors))
        began.release()
        model.release()
    return WeightReport.collect(tensors, part_of, starts, times=times, missing=model.missing)


def _measure(model: StoredModel, name: str, began: Beginning, times: float) -> TensorWeights:
    info, x = model.tensors[name], model.read(name)
    # What a delta directory leaves out is what it began with.
    start = x if info.is_pretrained and not info.has_adapter else began.read(name, info.dtype)
    return measure_tensor(name, x, times=times, start=start, has_adapter=info.has_adapter)
