"""What one step of training costs: operations of its passes, and the memory at its peak, counted on shapes.

B rows, P media per row, T tokens, N learned tokens.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlm_cli.costs.attention import fused_attention
from vlm_cli.costs.autocast import bfloat16_products
from vlm_cli.costs.flops import FlopCount, Work
from vlm_cli.costs.live import LiveBytes, count_weights
from vlm_cli.costs.prompt_run import PromptRun
from vlm_cli.costs.prompts import following
from vlm_cli.costs.workload import Workload
from vlm_cli.modeling.learned import IGNORED, find_learned
from vlm_cli.modeling.vlm import VLM

__all__ = ["StepMemory", "count_step_flops", "count_step_memory"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step of training, without the libraries.

    Attributes:
        weights: of all parts, in the dtypes in which they train or stay frozen.
        gradients: of what trains.
        states: of the optimizer.
        activations: beyond these at the peak: what the backward pass needs, the logits, the pixels.
        peak: of all. Gradients and activations seldom have their most bytes at the same time, so it is below their sum.
    """

    weights: int
    gradients: int
    states: int
    activations: int
    peak: int

    def to_dict(self) -> dict[str, int]:
        """Return plain data."""
        return asdict(self)


class _StepRun:
    """One step's passes over a workload; its text is learned."""

    def __init__(self, model: VLM, workload: Workload, learned: int | None) -> None:
        self.model, self.run = model, PromptRun(model, workload)
        self.labels = self.run.ids.clone()
        text = workload.text if learned is None else min(learned, workload.text)
        self.labels[:, : workload.tokens - text] = IGNORED
        self.labels[:, 0] = IGNORED  # no token stands before it

    def forward(self) -> Any:
        """Compute the loss: float[]."""
        run, model = self.run, self.model
        media: dict[str, Any] = {}
        if run.workload.pictures:
            run.encode()
            if model.vision_encoder.num_views is None:
                media = {"vision_features": run.features, "vision_mask": run.mask, "media_layout": run.layout()}
                media["vision_grid"] = run.grid
            else:
                run.tokenize()
                media = {"vision_tokens": run.tokens, "media_mask": run.token_mask, "vision_grid": run.grid}
        run.features = None
        output = model(
            lang_x=run.ids,
            attention_mask=torch.ones_like(run.ids),
            labels=self.labels,
            logits_at=find_learned(self.labels),
            use_cache=False,
            **media,
        )
        run.tokens = None
        return output.loss


def count_step_flops(model: VLM, workload: Workload, *, learned: int | None = None) -> int:
    """Count the operations of the forward and the backward pass of a step.

    Args:
        model: on the meta device; what trains, its adapters and its gradient checkpointing are set.
        workload: the rows that are read at a time.
        learned: tokens of each row's text that are learned, the last ones; None for all.

    Raises:
        UsageError: if the composition cannot take such media.
        LanguageModelLimit: if the language model computes nothing without its weights.
    """
    step = _StepRun(model, workload, learned)
    was_training = model.training
    model.train()
    try:
        with following(model), FlopCount() as count:
            step.forward().backward()
    finally:
        model.zero_grad()
        model.train(was_training)
    return count.total


def count_step_memory(
    model: VLM,
    workload: Workload,
    *,
    learned: int | None = None,
    states: int = 0,
    bf16: bool = False,
) -> tuple[StepMemory, list[Work]]:
    """Follow the tensors of a step, and return its memory at the peak.

    Args:
        model: as for `count_step_flops`, its weights in the dtypes in which they train.
        workload: the rows that are read at a time.
        learned: as for `count_step_flops`.
        states: bytes of the optimizer's states.
        bf16: products are computed in bfloat16, as with autocast.

    Returns:
        The memory, and what each operation of torch does.

    Raises:
        UsageError, LanguageModelLimit: as `count_step_flops`.
    """
    held = [*model.parameters(), *model.buffers()]
    weights = count_weights(held)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    step = _StepRun(model, workload, learned)
    was_training = model.training
    model.train()
    try:
        with ExitStack() as stack:
            stack.enter_context(following(model))
            stack.enter_context(fused_attention())
            forget = stack.enter_context(bfloat16_products() if bf16 else nullcontext(lambda: None))
            live = stack.enter_context(LiveBytes(held))
            count = stack.enter_context(FlopCount())
            loss = step.forward()
            forget()
            loss.backward()
    finally:
        model.zero_grad()
        model.train(was_training)
    memory = StepMemory(weights, gradients, states, max(0, live.peak - gradients), weights + states + live.peak)
    return memory, count.works
