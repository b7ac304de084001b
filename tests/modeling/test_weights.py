"""Weights: saving, copying and counting them, and which of them train.

Section numbers are those of the invariants in docs/architecture.md. `tests/support/invariants.py` holds the checks that
other tests repeat on other models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.support import tiny
from tests.support.grid import first_of, grid
from tests.support.invariants import (
    bare,
    check_saved,
    check_state,
    check_trainable,
    differs,
    gradients,
    logits,
    opened,
    same,
    training,
)
from tests.support.tiny import VOCABULARY
from vlm_cli.modeling.fusion.cross_attention import GatedCrossAttentionBlock
from vlm_cli.modeling.vlm import VLM

each_fusion = pytest.mark.parametrize("fusion", tiny.FUSIONS)


# -- 6: save, load, copy -----------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
def test_saved_and_loaded_models_are_equal(model, tmp_path):
    check_saved(model, tmp_path)


def test_a_model_in_memory_is_rebuilt_from_its_tensors():
    check_state(opened())


@pytest.mark.sample(2)
@each_fusion
def test_hooks_follow_a_copy(fusion):
    model = opened(fusion=fusion)
    batch = tiny.batch(model)
    expected = logits(model, **batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, **batch), expected)
    tiny.stir(twin.added_tokens, 1.0)
    tiny.stir(twin.fusion, 1.0)
    assert differs(logits(twin, **batch), expected)
    assert torch.equal(logits(model, **batch), expected)


# -- 7: exactly the declared parameters train --------------------------------------------------------------------------


@pytest.mark.sample(2)
def test_exactly_the_declared_parameters_train(model):
    check_trainable(model)


def test_closed_gates_train_first():
    """The twin of the test above: behind a closed gate, a gradient is zero."""
    model = tiny.build()
    found = gradients(model)
    assert all(grad.any() for name, grad in found.items() if name.endswith("gate"))
    assert not any(grad.any() for name, grad in found.items() if name.startswith("vision_tokenizer"))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "also", first_of([("language_model",), ()]), ids=["trained language model", "frozen language model"]
)
def test_gradient_checkpointing_gives_the_same_gradients(model, also):
    with training(model, [*model.config.composition.trainable, *also]):
        model.train()
        expected = gradients(model)
        model.gradient_checkpointing_enable()
        with block_calls(model) as runs:
            found = gradients(model)
        model.gradient_checkpointing_disable()
        model.eval()
    assert len(runs) == 2 * sum(isinstance(x, GatedCrossAttentionBlock) for x in model.fusion.modules())
    assert set(found) == set(expected)
    for name, grad in found.items():
        same(grad, expected[name])


def test_gradient_checkpointing_may_repeat_the_hooks_of_a_layer(monkeypatch):
    """Remote code, and Transformers before 5.23, checkpoint a layer together with its hooks."""
    model = opened(fusion="cross-attention", language_model="llama")
    with training(model, model.config.composition.trainable):
        model.train()
        expected = gradients(model)
        model.gradient_checkpointing_enable()
        layers = model.lang_model.model.layers
        for layer in layers:
            layer.gradient_checkpointing = False  # the layer's own way

        def call(layer, *args, **kwargs):
            return layer._gradient_checkpointing_func(partial(nn.Module.__call__, layer, **kwargs), *args)

        monkeypatch.setattr(type(layers[0]), "__call__", call)
        with block_calls(model) as runs:
            found = gradients(model)
        assert len(runs) == 2 * len(model.fusion.blocks)
        # A copy checkpoints with its own conditioning.
        assert set(gradients(copy.deepcopy(model))) == set(expected)
    assert set(found) == set(expected)
    for name, grad in found.items():
        same(grad, expected[name])


@contextmanager
def block_calls(model: VLM) -> Iterator[list[int]]:
    """One entry for each time that a cross-attention block ran."""
    runs: list[int] = []
    blocks = [x for x in model.fusion.modules() if isinstance(x, GatedCrossAttentionBlock)]
    handles = [block.ff.register_forward_hook(lambda *_: runs.append(1)) for block in blocks]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def test_statistics_move_only_in_an_encoder_that_trains():
    model = opened(vision="resnet")
    vision_x = tiny.batch(model)["vision_x"]
    trained_encoder = copy.deepcopy(model.vision_encoder).requires_grad_(True).train()
    for encoder, moves in ((model.train().vision_encoder, False), (trained_encoder, True)):
        before = [x.clone() for x in encoder.buffers()]
        encoder(vision_x)
        assert any(differs(x, y) for x, y in zip(encoder.buffers(), before, strict=True)) is moves


def test_unknown_parts_do_not_train():
    with pytest.raises(ValueError, match=r"unknown parts \['head'\]\. Known: vision_encoder, "):
        tiny.build().set_trainable(["head"])


def test_weight_decay_falls_on_the_named_parts():
    model = tiny.build(weight_decay=0.1, weight_decay_on=["fusion"])
    decayed, others = model.parameter_groups()
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(p) for p in model.fusion.parameters()}
    assert {id(p) for p in others["params"]} == {
        id(p) for part in (model.vision_tokenizer, model.added_tokens) for p in part.parameters()
    }


# -- 8: tied weights are one tensor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("language_model", ["llama", "llama-tied"])
def test_tied_weights_are_counted_and_saved_once(language_model, tmp_path):
    model = tiny.build(language_model=language_model)
    lm, is_tied = model.lang_model, language_model == "llama-tied"
    assert sum(p.numel() for p in lm.parameters()) == sum(p.numel() for p in bare(model).parameters())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("lang_model.lm_head.weight" in names) is not is_tied
    loaded = VLM.from_pretrained(tmp_path).lang_model
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) is is_tied
    assert (
        len(dict(loaded.named_parameters()))
        == len(dict(lm.named_parameters()))
        == len([name for name in names if name.startswith("lang_model.")])
    )


# -- added tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@each_fusion
def test_added_tokens_have_their_own_logits(fusion):
    model = opened(fusion=fusion, language_model="llama")
    ids = tiny.row(model, 0).lang_x[:, :-2]
    with torch.no_grad():
        hidden = bare(model)(ids, output_hidden_states=True).hidden_states[-1]
        same(logits(model, lang_x=ids)[..., VOCABULARY:], model.added_tokens.head(hidden))


@pytest.mark.sample(2)
@each_fusion
def test_added_tokens_take_the_place_of_padded_rows(fusion):
    config = tiny.config(fusion=fusion)
    config.first_added_id, config.media_token_id = VOCABULARY - 4, VOCABULARY - 3
    model = tiny.open_gates(VLM(config).eval())
    ids = torch.randint(1, VOCABULARY - 4, (1, 6))
    expected = model.lang_model(ids).logits[..., : VOCABULARY - 4]
    found = logits(model, lang_x=ids)
    assert found.shape[-1] == VOCABULARY - 2 and torch.equal(found[..., :-2], expected)
    ids[0, 2] = VOCABULARY - 3
    assert model.generate(lang_x=ids, vision_x=torch.randn(1, 3, 32, 32), max_new_tokens=5).max() < VOCABULARY - 2


@pytest.mark.sample(2)
@pytest.mark.parametrize("language_model", ["llama", "gemma3_text", "opt-projected"])
def test_added_tokens_start_at_the_mean(language_model):
    model = tiny.build(language_model=language_model)
    added, table, head = (
        model.added_tokens,
        *(get() for get in (model.lang_model.get_input_embeddings, model.lang_model.get_output_embeddings)),
    )
    nn.init.zeros_(added.embedding.weight), nn.init.zeros_(added.head.weight)
    added.start_at_mean(table, head, chunk=7)
    with torch.no_grad():
        same(added.embedding.weight[0], table(torch.arange(VOCABULARY)).mean(0))
        same(added.head.weight[0], head.weight.mean(0))


# -- numbers of half the width -----------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@grid(tokenizer=tiny.TOKENIZERS, fusion=tiny.FUSIONS, language_model=["llama", "opt", "falcon_h1"])
def test_bfloat16_runs(fusion, language_model, tokenizer):
    model = opened(fusion=fusion, language_model=language_model, tokenizer=tokenizer)
    model = copy.deepcopy(model).to(torch.bfloat16)  # the tower is shared
    batch = tiny.batch(model, frames=2)
    found = logits(model, **batch)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert model.generate(**batch, max_new_tokens=2).shape[1] == batch["lang_x"].shape[1] + 2
