"""Logits of some tokens alone: those of all, and the same loss and gradients."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compatibility.language_models import model_types, tiny_vlm
from tests.support import tiny
from tests.support.invariants import differs, logits, opened, same
from vlm_cli.modeling import learned
from vlm_cli.modeling.learned import IGNORED, find_learned, row_losses
from vlm_cli.modeling.vlm import VLM


def labels_of(batch: dict[str, Any], last: int = 4) -> Tensor:
    """The last tokens of each row, and some before them."""
    labels = batch["lang_x"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    labels[:, :-last] = IGNORED
    labels[0, -2] = IGNORED  # a row of two answers
    return labels


def gradients(model: VLM, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of each parameter that has one."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


#: Heads that are tied, that have a bias, after a projection, whose logits are capped, and a state instead of attention.
@pytest.mark.sample(3)
@pytest.mark.parametrize("language_model", ["llama-tied", "gpt2", "opt-projected", "mamba", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("fusion", ["language-stream", "cross-attention"])
def test_loss_and_gradients_are_those_of_all_logits(language_model: str, fusion: str) -> None:
    model = opened(language_model=language_model, fusion=fusion, tokenizer="linear")
    model.set_trainable(["vision_tokenizer", "fusion", "added_tokens", "language_model"])
    batch = tiny.batch(model)
    labels = labels_of(batch)
    tokens = find_learned(labels)
    for items in (None, 17):
        loss, expected = gradients(model, **batch, labels=labels, num_items_in_batch=items)
        ours, found = gradients(model, **batch, labels=labels, num_items_in_batch=items, logits_at=tokens)
        torch.testing.assert_close(ours, loss, atol=1e-5, rtol=0)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    assert differs(ours, gradients(model, **batch, labels=labels, num_items_in_batch=17, logits_at=tokens[1:])[0])


def test_losses_of_rows_are_those_of_each_alone() -> None:
    model = opened(fusion="language-stream")
    batch = tiny.batch(model)
    labels = labels_of(batch)
    tokens = find_learned(labels)
    sums, numbers = row_losses(logits(model, **batch, logits_at=tokens), labels, tokens)
    every = logits(model, **batch).log_softmax(-1)
    for b, row in enumerate(labels.tolist()):
        expected = sum(-every[b, t - 1, label] for t, label in enumerate(row) if label != IGNORED)
        same(sums[b], expected)
        assert numbers[b] == sum(label != IGNORED for label in row)
    assert differs(sums, sums.roll(1))


def test_the_head_computes_nothing_else() -> None:
    model = opened(fusion="language-stream")
    batch, seen = tiny.batch(model), []
    tokens = find_learned(labels_of(batch))
    handle = model.lang_model.get_output_embeddings().register_forward_hook(
        lambda _, args, output: seen.append((args[0].shape[:2], output.shape[:2]))
    )
    assert logits(model, **batch, logits_at=tokens).shape[:2] == (1, len(tokens))
    handle.remove()
    assert seen == [((1, len(tokens)), (1, len(tokens)))]


@pytest.mark.matrix
@pytest.mark.parametrize("model_type", model_types())
def test_every_language_model(model_type: str) -> None:
    """Whatever a model does with its logits afterwards: it scales them, caps them, or cuts columns off."""
    model = tiny_vlm(model_type, "language-stream")
    batch = {key: x for key, x in tiny.batch(model, [1, 1]).items() if key != "vision_mask"}
    batch["attention_mask"] = None  # some read no padding
    batch["lang_x"] = batch["lang_x"][:, -8:]
    labels = batch["lang_x"].masked_fill(torch.arange(8) < 5, IGNORED)
    tokens = find_learned(labels)
    every = logits(model, **batch)
    found = logits(model, **batch, logits_at=tokens)[0]
    same(found, every.flatten(0, 1)[tokens])
    assert differs(found, every.flatten(0, 1)[tokens - 1])


def test_doctests() -> None:
    found = doctest.testmod(learned, extraglobs={"torch": torch})
    assert found.attempted and not found.failed
