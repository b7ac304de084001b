"""Frozen means frozen: a part that does not train drops nothing out, with and without checkpointed activations."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support import tiny
from vlm_cli.modeling.vlm import VLM


@pytest.fixture(scope="module")
def model() -> VLM:
    """OPT, whose layers drop out with functions of their own, and whose decoder leaves out whole layers."""
    found = tiny.open_gates(copy.deepcopy(tiny.build(language_model="opt", fusion="cross-attention")))
    decoder = found.lang_model.get_decoder()
    decoder.layerdrop = 0.5
    for module in (decoder, *decoder.layers):
        module.dropout = 0.5
    for layer in decoder.layers:
        layer.self_attn.dropout = 0.5
    return found


def step(model: VLM, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and gradients of one step; the random numbers of dropout follow the seed."""
    batch = tiny.batch(model)
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_frozen_language_model_drops_nothing_out(model):
    model.set_trainable(["fusion", "vision_tokenizer", "added_tokens"])
    expected, grads = step(model.eval(), 0)
    model.train()
    assert not model.lang_model.training and model.fusion.training and model.vision_tokenizer.training
    for seed in (1, 2):
        logits, found = step(model, seed)
        assert torch.equal(logits, expected) and all(map(torch.equal, found, grads))
    model.gradient_checkpointing_enable()
    try:
        calls = []
        layer = model.lang_model.get_decoder().layers[-1]
        handle = layer.fc1.register_forward_hook(lambda *_: calls.append(1))
        logits, found = step(model, 3)
        handle.remove()
        assert len(calls) == 2, "the layer did not checkpoint its activations"
        assert torch.equal(logits, expected)
        for ours, theirs in zip(found, grads, strict=True):
            torch.testing.assert_close(ours, theirs)
    finally:
        model.gradient_checkpointing_disable()


def test_a_language_model_that_trains_drops_out(model):
    """The twin of the test above."""
    model.set_trainable(["language_model"])
    expected, _ = step(model.eval(), 0)
    assert model.train().lang_model.training
    first, second = (step(model, seed)[0] for seed in (1, 2))
    assert not torch.equal(first, expected) and not torch.equal(first, second)


def test_a_part_that_is_frozen_later_stops_to_drop_out(model):
    model.set_trainable(["language_model"])
    model.train()
    model.set_trainable(["fusion"])
    assert model.fusion.training and not any(x.training for x in model.lang_model.modules())
    model.eval()
