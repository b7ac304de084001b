"""Adapters beside the layers of a part: where they stand, what trains, and what merging gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import seed_torch, tiny
from vlm_cli.composition.adapters import ADAPTABLE_PARTS, AdapterSettings
from vlm_cli.errors import UsageError
from vlm_cli.modeling.adapters import adapter_parameters, add_adapter, has_adapter, list_layers, plain_tensors
from vlm_cli.modeling.vlm import VLM

pytest.importorskip("peft")

KINDS = {"lora": {}, "dora": {"dora": True}, "rslora": {"rslora": True, "alpha": 3.0}}


@pytest.fixture(scope="module", params=["cross-attention", "language-stream"])
def model(request: pytest.FixtureRequest) -> VLM:
    return tiny.open_gates(tiny.build(fusion=request.param))


def adapt(model: VLM, part: str, **settings: Any) -> VLM:
    """A copy of a model with an adapter that is not the identity; `added_tokens` trains beside it."""
    adapted = copy.deepcopy(model)
    adapted.set_trainable(["added_tokens"])
    add_adapter(adapted.part_modules()[part], part, AdapterSettings(r=2, **settings))
    adapted.config.adapters = [part]
    seed_torch(1)
    with torch.no_grad():
        for _, x in adapter_parameters(adapted):
            x += torch.randn_like(x) * 0.1
    return adapted


def logits(model: VLM) -> Tensor:
    return model(**tiny.batch(model)).logits


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ADAPTABLE_PARTS)
def test_an_adapter_learns_beside_a_part_and_merges_into_it(model: VLM, part: str, kind: str) -> None:
    if not list_layers(model.part_modules()[part]):
        with pytest.raises(UsageError, match="can have no adapter: it has no parameters in this composition"):
            adapt(model, part)
        return
    adapted = adapt(model, part, **KINDS[kind]).train()
    before = {name: x.clone() for name, x in plain_tensors(adapted).items()}
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    found = logits(adapted)
    found.square().sum().backward()
    ours = {id(x) for _, x in adapter_parameters(adapted)}
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and id(p) not in ours}
    assert trained == {name for name in model.state_dict() if name.startswith("added_tokens.")}
    assert all(x.grad is not None and x.grad.any() for _, x in adapter_parameters(adapted))
    adapted.merge_adapters()
    assert not has_adapter(adapted) and adapted.config.adapters is None
    assert adapted.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(logits(adapted), found, atol=1e-4, rtol=1e-4)
    assert (logits(model) - found).abs().max() > 1e-2  # the twin: without the adapter


def test_a_new_adapter_changes_nothing_and_only_dropout_trains(model: VLM) -> None:
    adapted = copy.deepcopy(model)
    adapted.set_trainable([])
    add_adapter(adapted.lang_model, "language_model", AdapterSettings(dropout=0.5, targets=("q_proj",)))
    adapted.train()
    assert torch.equal(logits(adapted), logits(model.eval()))  # B is zero, so what is dropped does not matter
    names = {name.split(".")[-2] for name, x in adapted.lang_model.named_modules() if x.training}
    assert names == {"lora_dropout"}
    adapted.eval()
    assert not any(x.training for x in adapted.modules())


def test_layers_are_chosen_by_name() -> None:
    lm = tiny.build(language_model="gpt2").lang_model
    assert not any("lm_head" in name for name in list_layers(lm))
    for word, words in {
        "q_proj": "language_model has no layer 'q_proj'. language_model has: c_attn \\(2\\), c_proj \\(4\\)",
        "lm_head": "lm_head shares its weights with another table",
        "wte": "wte shares its weights",
        "ln_1": "ln_1 of language_model \\(LayerNorm\\) is no linear layer",
    }.items():
        with pytest.raises(UsageError, match=words):
            add_adapter(lm, "language_model", AdapterSettings(targets=("c_attn", word)))
    assert not has_adapter(lm)
    add_adapter(lm, "language_model", AdapterSettings(targets=("attn.c_proj", "c_fc")))
    adapted = {name.split(".lora_A")[0] for name, _ in adapter_parameters(lm) if "lora_A" in name}
    assert adapted == {f"transformer.h.{i}.{x}" for i in (0, 1) for x in ("attn.c_proj", "mlp.c_fc")}


def test_layers_inside_torchs_attention_are_left_out(model: VLM) -> None:
    """It reads their weights without calling them, so an adapter there would learn nothing."""
    names = list_layers(model.vision_encoder)
    assert names and not any("out_proj" in name for name in names)
    with pytest.raises(UsageError, match=r"out_proj of vision_encoder .* no linear layer that an adapter"):
        add_adapter(model.vision_encoder, "vision_encoder", AdapterSettings(targets=("out_proj",)))
