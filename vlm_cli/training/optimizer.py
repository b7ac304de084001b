"""Optimizers over groups of parameters, and the learning rates of a run that is resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vlm_cli.errors import UsageError
from vlm_cli.modeling.vlm import VLM
from vlm_cli.quiet import quiet_libraries

__all__ = ["MuonAdamW", "find_matrices", "make_optimizer", "set_learning_rates"]

#: AdamW's betas for the vectors and tables beside Muon. Muon's updates are large early in the run, so AdamW forgets
#: its first gradients sooner than with its usual betas.
_BETAS_BESIDE_MUON = (0.9, 0.98)


def make_optimizer(
    model: VLM, name: Literal["adamw", "muon"], groups: list[dict[str, Any]], *, rounds_at_random: bool = False
) -> Optimizer:
    """Make an optimizer of groups of parameters.

    Args:
        model: the `VLM` whose parameters they are.
        name: "muon" updates matrices with Muon, and all other parameters with AdamW.
        groups: from `group_parameters`, with the highest learning rate of the run and the weight decay of each.
        rounds_at_random: round weights in bfloat16 stochastically, and keep AdamW's states in 8 bits.

    Raises:
        UsageError: if torchao is needed and not installed.
    """
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    highest = max(group["lr"] for group in groups)
    if rounds_at_random:
        return _make_rounding(groups, highest)
    if name == "adamw":
        return AdamW(groups, lr=highest, fused=fused)
    matrices = find_matrices(model)
    split = []
    for group in groups:
        for is_matrix in (True, False):
            params = [p for p in group["params"] if (p in matrices) == is_matrix]
            if params:
                split.append({**group, "params": params, "matrices": is_matrix})
    return MuonAdamW(split, lr=highest, fused=fused)


def _make_rounding(groups: list[dict[str, Any]], highest: float) -> Optimizer:
    try:
        with quiet_libraries():  # torchao warns at every start
            from torchao.optim import AdamW8bit
    except ImportError:
        raise UsageError("--stochastic-rounding needs the package torchao: pip install 'vlm-cli[quantize]'") from None
    return AdamW8bit(groups, lr=highest, bf16_stochastic_round=True)


def find_matrices(model: VLM) -> set[nn.Parameter]:
    """Find the weights that map one vector to another: not embedding tables, not the head, not the added tokens."""
    tables = {model.get_output_embeddings().weight, *model.added_tokens.parameters()}
    found = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tables |= set(module.parameters(recurse=False))
            continue
        for name, parameter in module.named_parameters(recurse=False):
            # `latents`, `positional_embedding` and the like are tables too; their names do not end in `weight`.
            if parameter.ndim == 2 and name.endswith("weight"):
                found.add(parameter)
    return found - tables


class MuonAdamW(Optimizer):
    """Update groups with `matrices` with Muon and the others with AdamW, as one optimizer with one state.

    The steps of Muon are scaled to the size of AdamW's steps, so that both use the same learning rate.
    Source: Muon is Scalable for LLM Training (https://arxiv.org/abs/2502.16982).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, fused: bool = False) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        muon, adamw = self._split()
        # The inner optimizers write their own settings into the groups, which are the same objects.
        self._muon = Muon(muon, lr=lr, adjust_lr_fn="match_rms_adamw") if muon else None
        self._adamw = AdamW(adamw, lr=lr, betas=_BETAS_BESIDE_MUON, fused=fused) if adamw else None
        self._share()

    def _split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        groups = self.param_groups
        return [g for g in groups if g["matrices"]], [g for g in groups if not g["matrices"]]

    def _share(self) -> None:
        """Give the inner optimizers the groups and the state of this optimizer, not copies."""
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


def set_learning_rates(
    optimizer: Optimizer, scheduler: LambdaLR, wanted: Sequence[tuple[float, float]], factor: float
) -> None:
    """Give the groups of a resumed optimizer the rates of this command, not those of the command that was interrupted.

    Args:
        optimizer: the optimizer, whose state is loaded.
        scheduler: its scheduler, whose state is loaded.
        wanted: highest learning rate and weight decay of each group.
        factor: the learning rate now, as a share of the highest.
    """
    scheduler.base_lrs = [rate for rate, _ in wanted]
    for group, (rate, decay) in zip(optimizer.param_groups, wanted, strict=True):
        group.update(initial_lr=rate, weight_decay=decay)
        if isinstance(group["lr"], Tensor):  # torchao's optimizers, which are compiled, take no number
            group["lr"].fill_(rate * factor)
        else:
            group["lr"] = rate * factor
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
