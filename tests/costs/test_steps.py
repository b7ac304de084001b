"""The costs of a training step, counted on shapes, are those of a real step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support import tiny
from tests.support.costs import GROWN, grown, measured_peak, plain_products, real_prompt, shapes_of
from vlm_cli.costs.steps import count_step_flops, count_step_memory
from vlm_cli.costs.workload import Workload
from vlm_cli.modeling.learned import IGNORED, find_learned
from vlm_cli.modeling.vlm import VLM
from vlm_cli.training.learning_settings import DEFAULT_RATE
from vlm_cli.training.optimizer import make_optimizer
from vlm_cli.training.planned import plan_step
from vlm_cli.training.rates import group_parameters
from vlm_cli.training.settings import TrainingSettings
from vlm_cli.training.trainable import choose_precision, make_trainable

OURS = ("vision_tokenizer", "fusion", "added_tokens")
SETTINGS = {
    "frozen": TrainingSettings(trainable=("vision_tokenizer", "added_tokens")),
    "checkpointed": TrainingSettings(trainable=(*OURS, "language_model"), gradient_checkpointing=True),
    "whole": TrainingSettings(trainable=(*OURS, "language_model", "vision_encoder")),
    "lora": TrainingSettings(trainable=("vision_tokenizer",), lora=("language_model:r=4",)),
    "bf16": TrainingSettings(trainable=(*OURS, "language_model"), bf16=True, gradient_checkpointing=True),
    "muon": TrainingSettings(trainable=("vision_tokenizer", "language_model"), optimizer="muon"),
}


def trained(model: VLM, settings: TrainingSettings) -> VLM:
    """Let a real model train as `vlm train` does."""
    choose_precision(model, settings)
    make_trainable(model, settings, "MODEL")
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def real_pass(model: VLM, workload: Workload, *, bf16: bool = False) -> Callable[[], Any]:
    """The forward and the backward pass of a step that learns the text."""

    def run() -> None:
        inputs = real_prompt(model, workload)
        labels = inputs["lang_x"].clone()
        labels[:, : max(1, workload.pictures)] = IGNORED
        with torch.autocast("cpu", enabled=bf16, dtype=torch.bfloat16):
            loss = model(**inputs, labels=labels, logits_at=find_learned(labels), use_cache=False).loss
        loss.backward()

    return run


@pytest.mark.sample(1)
@pytest.mark.parametrize("settings", ["frozen", "lora", "checkpointed", "whole"])
@pytest.mark.parametrize("parts", tiny.covering(), ids="-".join)
def test_operations_are_those_of_a_real_step(parts: tuple[str, str, str, str], settings: str) -> None:
    model, workload = tiny.build(*parts), Workload(pictures=2, text=9, rows=2)
    if settings == "lora" and parts[-1] in ("mamba", "mamba2", "falcon_h1"):
        pytest.skip("PEFT puts no adapter beside out_proj of these")
    shapes = shapes_of(model)
    plan_step(shapes, SETTINGS[settings], "MODEL")
    trained(model, SETTINGS[settings])
    if model.lang_model._can_set_experts_implementation():
        model.lang_model.set_experts_implementation("batched_mm")  # the counter passes over grouped products
    with plain_products(), FlopCounterMode(display=False) as counter:
        real_pass(model, workload)()
    assert count_step_flops(shapes, workload) == counter.get_total_flops()
    assert count_step_flops(shapes, Workload(pictures=2, text=10, rows=2)) > counter.get_total_flops()


@pytest.mark.sample(1)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("fusion", "tokenizer"), [("cross-attention", "perceiver"), ("language-stream", "mlp")])
@pytest.mark.parametrize("size", GROWN)
def test_memory_is_that_of_a_real_step(size: str, fusion: str, tokenizer: str, settings: str) -> None:
    model, workload = grown(size, tokenizer, fusion), Workload(pictures=2, text=300, rows=2)
    chosen = SETTINGS[settings]
    shapes = shapes_of(model)
    states = plan_step(shapes, chosen, "MODEL")
    counted, _ = count_step_memory(shapes, workload, states=states, bf16=chosen.bf16)
    trained(model, chosen)
    groups = group_parameters(model, DEFAULT_RATE, default_rate=DEFAULT_RATE)
    optimizer = make_optimizer(model, chosen.optimizer, groups)
    run = real_pass(model, workload, bf16=chosen.bf16)

    def step() -> None:
        run()
        optimizer.step()
        optimizer.zero_grad()

    step()  # which makes the states
    real_states = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor))
    weights = sum(p.nbytes for p in model.parameters())
    assert abs(counted.peak / (measured_peak(step) + real_states + weights) - 1) < 0.1
    assert abs(counted.states / real_states - 1) < 0.02
    assert counted.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    longer, _ = count_step_memory(shapes, Workload(pictures=2, text=400, rows=2), states=states, bf16=chosen.bf16)
    assert longer.activations > 1.15 * counted.activations
