"""The compiled step and the attention for one position: near enough to the plain path, or equal to it."""

from __future__ import annotations

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
from vlm_cli.modeling.acceleration import compile_for, one_position_attention
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
    monkeypatch.setitem(acceleration.ALL_ATTENTION_FUNCTIONS._local_mapping, acceleration.ONE_POSITION, counted)
    torch.testing.assert_close(scores(model, inputs), expected, **TOLERANCE)
    if language_model == "llama":
        assert 1 in calls  # the comparison was one


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
