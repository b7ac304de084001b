"""What is measured of a model while it trains: its held-out loss, memory, and how far its gates are open."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from vlm_cli.modeling.learned import row_losses
from vlm_cli.modeling.memory import peak_memory
from vlm_cli.modeling.vlm import VLM

__all__ = ["held_out_loss", "measure_model"]


def held_out_loss(
    model: Any,
    batches: Iterable[dict[str, Any]],
    *,
    fill_media: Callable[[dict[str, Any]], Any],
    gather: Callable[[Any], Any],
) -> float:
    """Return the mean loss over all learned tokens of batches.

    Args:
        model: a `VLM` in evaluation mode, or what wraps it.
        batches: as the collator makes them, on the model's device.
        fill_media: gives a batch of text media that nobody sees, where other processes need them.
        gather: joins the losses and the numbers of tokens of each row over all processes.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    for inputs in batches:
        del inputs["records"], inputs["num_tokens"]
        labels = inputs.pop("labels")
        fill_media(inputs)
        rows = row_losses(model(**inputs, use_cache=False).logits, labels, inputs["logits_at"])
        losses, counts = gather(rows)
        totals += torch.stack([losses.double().sum(), counts.double().sum()]).cpu()
    return float(totals[0] / totals[1])


def measure_model(model: VLM | None, device: torch.device) -> dict[str, float]:
    """Return the peak of the memory so far, in bytes, and how far the gates of each kind are open on average.

    Args:
        model: the model; None if its weights are spread over processes, so that nobody sees its gates.
        device: on which it trains.
    """
    gates: dict[str, list[float]] = {}
    for name, gate in () if model is None else model.gates().items():
        gates.setdefault(name.rpartition(".")[2], []).append(float(gate.detach().float().tanh().abs().mean()))
    opened = {f"gates/{kind}": round(sum(some) / len(some), 6) for kind, some in gates.items()}
    return {"memory": peak_memory(device), **opened}
