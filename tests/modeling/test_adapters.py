"""Libraries that replace or wrap modules of the language model, as PEFT does: hooks run on what stands there now."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import seed_torch, tiny
from vlm_cli.errors import LanguageModelLimit
from vlm_cli.modeling.vlm import VLM

peft = pytest.importorskip("peft")

QUERIES = r"lang_model\..*q_proj"
TABLE, HEAD = "lang_model.model.embed_tokens", "lang_model.lm_head"
#: Where an adapter is -> settings of PEFT.
ADAPTERS: dict[str, dict[str, Any]] = {
    "table": {"target_modules": TABLE},
    "head": {"target_modules": HEAD},
    "saved head": {"target_modules": QUERIES, "modules_to_save": ["lm_head"]},
    "saved table and head": {"target_modules": QUERIES, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved layer": {"target_modules": TABLE, "modules_to_save": ["lang_model.model.layers.1"]},
    "tokens": {"target_modules": QUERIES, "trainable_token_indices": {"embed_tokens": [5, 6]}},
    "list of tokens": {"target_modules": QUERIES, "trainable_token_indices": [5, 6]},
    "added tokens": {"target_modules": QUERIES, "modules_to_save": ["added_tokens"]},
}


@pytest.fixture(scope="module", params=["cross-attention", "language-stream"])
def model(request: pytest.FixtureRequest) -> VLM:
    return tiny.open_gates(tiny.build(fusion=request.param))


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    return model(**inputs).logits


def adapt(model: VLM, **settings: Any) -> Any:
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **settings)).eval()


@pytest.mark.sample(2)
@pytest.mark.parametrize("where", ADAPTERS)
def test_an_adapter_that_starts_as_the_identity_changes_nothing(model: VLM, where: str) -> None:
    inputs = tiny.batch(model)
    adapted = adapt(model, **ADAPTERS[where])
    assert logits(adapted, **inputs).equal(logits(model, **inputs))
    one = tiny.batch(model, (2,))
    assert adapted.generate(**one, max_new_tokens=3).equal(model.generate(**one, max_new_tokens=3))


def test_trained_rows_of_a_table_that_the_head_shares_are_refused() -> None:
    """PEFT trains them in the table alone, and in the head of Transformers' own models, too."""
    model = tiny.build(language_model="gpt2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    inputs = tiny.batch(model, (1,))
    adapted = adapt(model, target_modules=r"lang_model\..*c_proj", fan_in_fan_out=True, trainable_token_indices=[5, 6])
    with pytest.raises(LanguageModelLimit, match="trainable_token_indices would train rows of the embedding table al"):
        logits(adapted, **inputs)
    whole = adapt(model, target_modules="lang_model.transformer.wte", modules_to_save=["lm_head"])
    assert logits(whole, **inputs).equal(logits(model, **inputs))


@pytest.mark.sample(2)
@pytest.mark.parametrize("where", ["table", "head", "tokens", "saved table and head"])
def test_a_trained_adapter_gives_what_the_changed_weights_give(model: VLM, where: str) -> None:
    inputs = tiny.batch(model)
    adapted, changed = adapt(model, **ADAPTERS[where]), copy.deepcopy(model)
    seed_torch(1)
    with torch.no_grad():
        for name, x in adapted.named_parameters():
            if any(kind in name for kind in ("lora_embedding", "lora_A", "lora_B", "tokens_delta", "modules_to_save")):
                x += torch.randn_like(x) * 0.5
    lm = adapted.base_model.model.lang_model
    table, head = changed.lang_model.model.embed_tokens.weight.data, changed.lang_model.lm_head.weight.data
    if where == "table":
        adapter = lm.model.embed_tokens
        table += (adapter.lora_embedding_B["default"] @ adapter.lora_embedding_A["default"]).T * adapter.scaling[
            "default"
        ]
    elif where == "head":
        adapter = lm.lm_head
        head += adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight * adapter.scaling["default"]
    elif where == "tokens":
        table[[5, 6]] = lm.model.embed_tokens.token_adapter.trainable_tokens_delta["default"].data
    else:
        table.copy_(lm.model.embed_tokens.modules_to_save["default"].weight)
        head.copy_(lm.lm_head.modules_to_save["default"].weight)
    for ours, adapters in zip(changed.lang_model.model.layers, lm.model.layers, strict=True):
        if hasattr(q := adapters.self_attn.q_proj, "lora_A"):
            delta = q.lora_B["default"].weight @ q.lora_A["default"].weight
            ours.self_attn.q_proj.weight.data += delta * q.scaling["default"]
    found, wanted = logits(adapted, **inputs), logits(changed, **inputs)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    assert (wanted - logits(model, **inputs)).abs().max() > 0.1
    whole = adapted.merge_and_unload()  # puts plain modules back
    torch.testing.assert_close(logits(whole, **inputs), wanted, atol=2e-4, rtol=1e-4)


def test_a_language_model_that_is_replaced_as_a_whole_is_refused(model: VLM) -> None:
    adapted = adapt(model, target_modules=r"vision_encoder\..*c_fc", modules_to_save=["lang_model"])
    with pytest.raises(LanguageModelLimit, match="replaced or wrapped the language model as a whole"):
        logits(adapted, **tiny.batch(model, (1,)) | {"lang_x": torch.tensor([[5, 6, 7]]), "vision_x": None})


def test_a_copy_of_a_model_has_hooks_of_its_own(model: VLM) -> None:
    inputs = tiny.batch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.added_tokens.embedding.weight += 1
        twin.vision_tokenizer.latents += 1
    assert not logits(twin, **inputs).equal(logits(model, **inputs))
    table = copy.deepcopy(model.get_input_embeddings())  # copies no model
    assert all(hook.model is None for hook in table._forward_hooks.values())


def test_another_number_of_tokens_is_refused_before_anything_changes(model: VLM) -> None:
    before = logits(model, **tiny.batch(model))
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(LanguageModelLimit, match="Name new tokens when you build the model"):
        model.resize_token_embeddings(99)
    assert logits(model, **tiny.batch(model)).equal(before)
