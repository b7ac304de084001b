"""What is compared: models of shapes by name, and what each of them costs for a workload."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from vlm_cli.composition import Composition
from vlm_cli.costs.cards import Card
from vlm_cli.costs.prompts import PromptCost, count_prompt
from vlm_cli.costs.steps import StepMemory, count_step_flops, count_step_memory
from vlm_cli.costs.workload import Workload
from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.vlm import VLM

__all__ = ["Cost", "StepCost", "Subject", "with_fusion"]


@dataclass(frozen=True)
class StepCost:
    """What a step of training costs.

    Attributes:
        flops: of the forward and the backward pass of all rows, what checkpointing computes twice included.
        memory: at the peak.
        seconds: of both passes and the optimizer, estimated; None without a card.
    """

    flops: int
    memory: StepMemory
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        found = {"flops": self.flops, "memory": self.memory.to_dict()}
        return found if self.seconds is None else {**found, "seconds": self.seconds}


@dataclass(frozen=True)
class Cost:
    """What a workload costs one subject.

    Attributes:
        prompt: reading it and answering.
        step: learning it; None if the subject does not train.
        first_seconds: until the first new token, estimated; None without a card.
        token_seconds: for each token after it.
    """

    prompt: PromptCost
    step: StepCost | None
    first_seconds: float | None
    token_seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        found = self.prompt.to_dict()
        if self.first_seconds is not None:
            found["seconds"] = {"first_token": self.first_seconds, "next_token": self.token_seconds}
        return found if self.step is None else {**found, "step": self.step.to_dict()}


@dataclass
class Subject:
    """A model whose costs are counted.

    Attributes:
        name: for tables.
        model: on the meta device, in the dtype in which it answers.
        trained: a copy that trains, from `plan_step`; None to count no training.
        states: bytes of the optimizer's states.
        learned: tokens of the text that are learned; None for all.
        bf16: training computes in bfloat16.
        card: for estimated seconds; None for none.
    """

    name: str
    model: VLM
    trained: VLM | None = None
    states: int = 0
    learned: int | None = None
    bf16: bool = False
    card: Card | None = None
    _known: dict[Workload, Cost] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Dtype of the weights."""
        return str(self.model.dtype).removeprefix("torch.")

    def count(self, workload: Workload) -> Cost:
        """Count what a workload costs; the same one is counted once.

        Raises:
            VLMError: if the model cannot take it.
        """
        if workload not in self._known:
            self._known[workload] = self._count(workload)
        return self._known[workload]

    def _count(self, workload: Workload) -> Cost:
        prompt = count_prompt(self.model, workload)
        first = last = None
        if self.card is not None:
            first, last = (self.card.seconds(x, self.dtype) for x in (prompt.first, prompt.next))
        return Cost(prompt, None if self.trained is None else self._count_step(self.trained, workload), first, last)

    def _count_step(self, model: VLM, workload: Workload) -> StepCost:
        flops = count_step_flops(model, workload, learned=self.learned)
        memory, works = count_step_memory(model, workload, learned=self.learned, states=self.states, bf16=self.bf16)
        if self.card is None:
            return StepCost(flops, memory, None)
        seconds = self.card.seconds(works, "bfloat16" if self.bf16 else "float32")
        # The optimizer reads weights, gradients and states, and writes weights and states.
        moved = 3 * memory.gradients + 2 * self.states
        return StepCost(flops, memory, seconds + moved / (self.card.bandwidth * self.card.moved))


def with_fusion(model: VLM, fusion: str) -> VLM:
    """Return a model of shapes with the same parts and another fusion, which has its defaults.

    Raises:
        CompositionError: if the parts and the fusion do not fit.
    """
    config = copy.deepcopy(model.config)
    parts = config.composition.to_dict() | {"fusion": {"type": fusion}}
    parts["weight_decay_on"] = [part for part in parts["weight_decay_on"] if part != "fusion"]
    config.composition = Composition.from_dict(parts)
    with meta_device():
        return VLM(config).to(model.dtype).eval()
