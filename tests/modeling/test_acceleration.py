"""Int8 weights, the compiled step and the attention for one position: near enough to the plain path, or equal to it."""

from __future__ import annotations

import copy
import itertools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import vlm_cli
from tests.support import seed_torch, tiny
from tests.support.grid import grid
from tests.support.tiny import IMAGE
from vlm_cli.errors import LanguageModelLimit, VLMError
from vlm_cli.modeling import acceleration
from vlm_cli.modeling.acceleration import Int8Linear, compile_for, one_position_attention
from vlm_cli.modeling.vlm import VLM

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
#: Layers of every kind: joined and separate weights, biases, and states instead of attention.
QUICK = ("llama", "gpt2", "opt-projected", "falcon", "mamba2", "jamba")
each_language_model = grid(language_model=tiny.LANGUAGE_MODELS, quick={"language_model": QUICK})
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def scores(model: VLM, inputs: dict[str, Any], **options: Any) -> Tensor:
    """Logits of what is generated, without those of `<image>`."""
    found = model.generate(**inputs, **NEW, **options, output_scores=True, return_dict_in_generate=True)
    return torch.stack(found.scores)[..., :IMAGE].float()


# -- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head"])
def test_attention_is_that_of_sdpa(heads, length, mask):
    seed_torch(0)
    h, g = heads
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = h // g, True
    q, k, v = torch.randn(2, h, length, 8), torch.randn(2, g, 9, 8), torch.randn(2, g, 9, 8)
    seen = torch.rand(2, h if mask == "per head" else 1, length, 9) > 0.3
    seen[..., 0] = True
    masks = {"none": None, "bool": seen, "per head": seen, "float": torch.where(seen, 0.0, -1e30)}
    expected, _ = sdpa_attention_forward(module, q, k, v, masks[mask], scaling=0.3)
    found, _ = one_position_attention(module, q, k, v, masks[mask], scaling=0.3)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    other, _ = one_position_attention(module, q, k, v, masks[mask], scaling=0.4)
    assert not torch.allclose(other, expected, atol=1e-3)


@pytest.mark.sample(2)
@each_language_model
def test_attention_changes_no_answer(language_model, monkeypatch):
    model = tiny.open_gates(tiny.build(language_model=language_model))
    inputs = tiny.batch(model, (2, 0, 1))
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1].shape[2])
        return one_position_attention(*args, **kwargs)

    expected = scores(model, inputs)
    acceleration.use_one_position_attention(model)
    monkeypatch.setitem(acceleration.ALL_ATTENTION_FUNCTIONS._local_mapping, acceleration._ATTENTION, counted)
    torch.testing.assert_close(scores(model, inputs), expected, **TOLERANCE)
    if language_model == "llama":
        assert 1 in calls  # the comparison was one


# -- int8 -----------------------------------------------------------------------------------------------------------


def test_int8_is_as_near_as_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    seed_torch(0)
    theirs = nn.Sequential(nn.Linear(64, 48, bias=False))
    weight = theirs[0].weight.detach().clone()
    quantization.quantize_(theirs, quantization.Int8WeightOnlyConfig())
    our_error, their_error = (
        (x.float() - weight).pow(2).mean()
        for x in (Int8Linear(weight, None)._dequantized(torch.float32), theirs[0].weight.dequantize())
    )
    assert our_error < 1.05 * their_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 7)])
def test_int8_linear(shape, dtype):
    seed_torch(0)
    linear = nn.Linear(64, 48).to(dtype)
    linear.weight.data[3] = 0  # a row without a scale
    quantized = Int8Linear(linear.weight, linear.bias)
    x = torch.randn(*shape, 64).to(dtype)
    with torch.no_grad():
        out, plain = quantized(x), linear(x)
        as_multiplied = nn.functional.linear(x.float(), quantized._dequantized(torch.float32), linear.bias.float())
    assert out.dtype == dtype and out.shape == (*shape, 48)
    torch.testing.assert_close(out.float(), as_multiplied, atol=0.03, rtol=0.02)  # sums in bfloat16
    assert 0 < (out - plain).abs().max() < 0.1
    # Half a step, and what the largest of a row loses to the scale's rounding.
    error = (quantized._dequantized(torch.float32) - linear.weight.float()).abs()
    assert error.max() < linear.weight.abs().max() * (1 / 254 + 1 / 256)


@pytest.mark.sample(2)
@grid(
    language_model=tiny.LANGUAGE_MODELS, fusion=["cross-attention", "language-stream"], quick={"language_model": QUICK}
)
def test_int8_answers_nearly_the_same(language_model, fusion):
    model = tiny.open_gates(tiny.build(fusion=fusion, language_model=language_model))
    inputs = tiny.batch(model, (2, 2))
    with torch.no_grad():
        plain = model(**inputs).logits[..., :IMAGE]
        other = model(**inputs | {"vision_x": -inputs["vision_x"]}).logits[..., :IMAGE]
    hooks = len(model.lang_model.get_output_embeddings()._forward_hooks)
    vlm_cli.accelerate(model, quantize="int8")
    head = model.lang_model.get_output_embeddings()
    assert isinstance(head, Int8Linear) and len(head._forward_hooks) == hooks
    assert not any(isinstance(x, nn.Linear) for part in (model.fusion, model.lang_model) for x in part.modules())
    with torch.no_grad():
        found = model(**inputs).logits
    assert found.shape[-1] == tiny.VOCABULARY + len(model.config.added_tokens)
    error, signal = ((x - plain).pow(2).mean().sqrt() for x in (found[..., :IMAGE], other))
    assert 0 < error < 0.35 * plain.std() and error < 2 * signal
    assert model.generate(**inputs, **NEW).shape[1] == inputs["lang_x"].shape[1] + 6


def test_int8_keeps_the_input_table_and_frees_the_rest():
    model = tiny.build()
    before = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    vlm_cli.accelerate(model, quantize="int8")
    left = {name for name, _ in model.named_parameters()}
    gone = [name for name in before if name not in left]
    assert "lang_model.model.embed_tokens.weight" in left
    assert sum(name.startswith("fusion.blocks") for name in gone) >= 8 and any("mlp" in name for name in gone)


def test_int8_refusals(monkeypatch):
    model = tiny.build()
    with monkeypatch.context() as patched:
        patched.setattr(acceleration, "Conv1D", int)
        # A head alone is not worth it: everything else is of a kind that is not known.
        for module in model.lang_model.modules():
            if type(module) is nn.Linear and module is not model.lang_model.get_output_embeddings():
                module.__class__ = type("Other", (nn.Linear,), {"forward": lambda self, x: x.relu()})
        with pytest.raises(LanguageModelLimit, match="no linear layers"):
            acceleration.quantize_int8(model)
    with pytest.raises(VLMError, match="int8 weights work on the CPU only"):
        acceleration.quantize_int8(copy.deepcopy(model).to("meta"))


# -- compilation ----------------------------------------------------------------------------------------------------


def compiled_equals_plain(model: VLM, counts: tuple[int, ...], backend: str = "inductor") -> None:
    torch._dynamo.reset()
    inputs = tiny.batch(model, counts)
    inputs = {"input_ids": inputs.pop("lang_x"), **inputs}
    other = inputs | {"vision_x": inputs["vision_x"].flip(-1)}
    plain, plain_other = scores(model, inputs), scores(model, other)
    vlm_cli.accelerate(model, compile=True)
    settings = model.generation_config.compile_config
    assert settings.backend == "inductor"
    if backend != "inductor":
        settings.backend, settings.options = backend, None
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    with torch.inference_mode():
        assert compile_for(model, **inputs, **NEW) > 0
        compiled = graphs["unique_graphs"]
        assert compiled > before
        torch.testing.assert_close(scores(model, inputs), plain, **TOLERANCE)
        torch.testing.assert_close(scores(model, other), plain_other, **TOLERANCE)
    assert graphs["unique_graphs"] == compiled  # nothing was compiled after `compile_for`
    assert (plain - plain_other).abs().max() > 1e-3


@pytest.mark.matrix
@needs_compiler
def test_compiled_step_answers_the_same():
    """Torch traces the step and runs the graph as it is. `-m matrix` compiles to C++, half a minute for each model."""
    compiled_equals_plain(tiny.open_gates(tiny.build()), (2, 1), backend="aot_eager")


@needs_compiler
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("language_model", "fusion"), list(zip(tiny.LANGUAGE_MODELS, itertools.cycle(tiny.FUSIONS), strict=False))
)
def test_every_compiled_step_answers_the_same(language_model, fusion):
    model = tiny.open_gates(tiny.build(fusion=fusion, language_model=language_model))
    if not model.lang_model._can_compile_fullgraph:
        with pytest.raises(LanguageModelLimit, match="cannot be compiled"):
            vlm_cli.accelerate(model, compile=True)
        return
    compiled_equals_plain(model, (2, 1))


def test_without_a_compiler():
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(VLMError, match=r"--compile needs a C\+\+ compiler.*Install g\+\+"):
        vlm_cli.accelerate(tiny.build(), compile=True)
