"""Optimizers over a model's own parameter groups, and how their learning rate runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

__all__ = ["MuonAdamW", "Schedule", "learning_rate_factor", "make_optimizer", "matrices"]

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "constant"]

#: Shorter memory for the few vectors and tables beside Muon, whose updates are large early on.
_BETAS_BESIDE_MUON = (0.9, 0.98)


def make_optimizer(model: Any, name: OptimizerName, learning_rate: float) -> Optimizer:
    """An optimizer of the model's trainable parameters, with the composition's weight decay.

    Args:
        model: a `VLM`.
        name: of the optimizer.
        learning_rate: at its highest.
    """
    groups = model.parameter_groups()
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    if name == "adamw":
        return AdamW(groups, lr=learning_rate, fused=fused)
    chosen = matrices(model)
    split = []
    for group in groups:
        for is_matrix in (True, False):
            params = [p for p in group["params"] if (p in chosen) == is_matrix]
            if params:
                split.append({**group, "params": params, "matrices": is_matrix})
    return MuonAdamW(split, lr=learning_rate, fused=fused)


def matrices(model: Any) -> set[nn.Parameter]:
    """Weights that map one vector to another: neither tables of embeddings, nor the head, nor what is added to them."""
    tables = {model.get_output_embeddings().weight, *model.added_tokens.parameters()}
    found = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tables |= set(module.parameters(recurse=False))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            # `latents`, `positional_embedding` and the like are tables under other names.
            if parameter.ndim == 2 and name.endswith("weight"):
                found.add(parameter)
    return found - tables


class MuonAdamW(Optimizer):
    """Muon for groups with `matrices`, AdamW for the others, as one optimizer with one state.

    Muon's steps are scaled to the size of AdamW's, so that both take the same learning rate.
    Source: Muon is Scalable for LLM Training (https://arxiv.org/abs/2502.16982).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, fused: bool = False) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        muon, adamw = self._split()
        # The inner optimizers fill in their settings in the groups, which are these same objects.
        self._muon = Muon(muon, lr=lr, adjust_lr_fn="match_rms_adamw") if muon else None
        self._adamw = AdamW(adamw, lr=lr, betas=_BETAS_BESIDE_MUON, fused=fused) if adamw else None
        self._share()

    def _split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        groups = self.param_groups
        return [g for g in groups if g["matrices"]], [g for g in groups if not g["matrices"]]

    def _share(self) -> None:
        """Let the inner optimizers see our groups and our state."""
        for inner, groups in zip((self._muon, self._adamw), self._split(), strict=True):
            if inner is not None:
                inner.param_groups, inner.state = groups, self.state

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner in (self._muon, self._adamw):
            if inner is not None:
                inner.step()
        return loss


def learning_rate_factor(schedule: Schedule, *, step: int, progress: float, warmup: float = 0.0) -> float:
    """Share of the highest learning rate at a step.

    >>> [learning_rate_factor("linear", step=s, progress=s / 8, warmup=4) for s in range(9)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]

    Args:
        schedule: how it falls after the warmup.
        step: number of steps that are done.
        progress: share of the run that is done, in steps or in time.
        warmup: steps over which it rises; below 1, a share of the run.
    """
    if warmup >= 1:
        risen = step / warmup
        share = progress / max(risen, 1.0)  # what the warmup takes of the run
    else:
        risen = progress / warmup if warmup else 1.0
        share = warmup
    if risen < 1:
        return risen
    if schedule == "constant":
        return 1.0
    left = (1 - progress) / (1 - share) if progress < 1 else 0.0
    return left if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
