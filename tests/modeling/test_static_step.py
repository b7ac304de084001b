"""The step with fixed tensors: the same answers, also where a graph that was captured once runs for each token."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from tests.support import tiny
from tests.support.grid import grid
from tests.support.recorded_graph import record
from tests.support.tiny import IMAGE
from vlm_cli.modeling.decoding import loop, static
from vlm_cli.modeling.decoding.static import StaticStep
from vlm_cli.modeling.vlm import VLM

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
NEW: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
QUICK = ("llama", "mistral", "gemma2", "opt")


@contextmanager
def capturing(model: VLM, graph: Any = record) -> Iterator[list[StaticStep]]:
    """Steps are captured, and the tensors of one call are not given to the next."""
    made: list[StaticStep] = []

    class Captured(StaticStep):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args[:-1], graph)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "StaticStep", Captured)
        patch.setattr(model, "static_step", None)
        yield made


def scores(model: VLM, inputs: dict[str, Any], **options: Any) -> Tensor:
    found = model.generate(**inputs, **NEW | options, output_scores=True, return_dict_in_generate=True)
    return torch.stack(found.scores)[..., :IMAGE].float()


def compiles(model: VLM) -> bool:
    return model.lang_model._can_compile_fullgraph


@pytest.mark.sample(2)
@grid(language_model=tiny.LANGUAGE_MODELS, fusion=tiny.FUSIONS, quick={"language_model": QUICK})
def test_a_captured_step_answers_the_same(language_model, fusion):
    model = tiny.open_gates(tiny.build(fusion=fusion, language_model=language_model))
    if not compiles(model):
        pytest.skip("Transformers has no static cache for it")
    inputs = tiny.batch(model, (2, 0, 1))
    other = inputs | {"vision_x": inputs["vision_x"].flip(-1)}
    plain = scores(model, inputs)
    with torch.inference_mode(), capturing(model) as made:
        torch.testing.assert_close(scores(model, inputs, **STATIC), plain, **TOLERANCE)
        assert made[0]._replay is not None and made[0].graph is record
        tokens = [model.generate(**x, **NEW, **STATIC) for x in (inputs, other, inputs)]
    assert len(made) == 2  # a cache that the caller gets belongs to the caller
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[0], model.generate(**inputs, **NEW))
    assert torch.equal(tokens[1], model.generate(**other, **NEW))
    assert (plain - scores(model, other)).abs().max() > 1e-3


def test_twins_of_a_graph(caplog):
    """What a graph cannot hold is seen: a number in Python, a look of the host."""
    model = tiny.open_gates(tiny.build(language_model="mistral"))
    inputs = tiny.batch(model, (1, 1))
    plain = model.generate(**inputs, **NEW)
    with pytest.MonkeyPatch.context() as patch, capturing(model):
        patch.setattr(static, "make_static_cache", lambda config, length: StaticCache(config, max_cache_len=length))
        with pytest.raises(AssertionError, match="counts in Python"):
            model.generate(**inputs, **NEW, **STATIC)
    with pytest.MonkeyPatch.context() as patch, capturing(model) as made:
        prepare = VLM.prepare_inputs_for_generation
        patch.setattr(VLM, prepare.__name__, wraps(prepare)(lambda *args, **more: look(prepare(*args, **more))))
        assert torch.equal(model.generate(**inputs, **NEW, **STATIC), plain)
        assert made[0].graph is None and "_local_scalar_dense" in caplog.text
    with capturing(model) as made:
        answer = model.generate(**inputs, **NEW, **STATIC)
        assert torch.equal(answer, plain) and made[0]._replay is not None
        made[0].begin = lambda kwargs: None  # the positions and media of the first answer
        assert not torch.equal(
            model.generate(**inputs | {"vision_x": inputs["vision_x"].neg()}, **NEW, **STATIC), answer
        )


def look(inputs: dict[str, Any]) -> dict[str, Any]:
    assert int(inputs["input_ids"][0, 0]) >= 0
    return inputs


def test_a_kept_step_serves_what_fits(monkeypatch):
    monkeypatch.setattr(static, "ROUND", 8)
    model = copy.deepcopy(tiny.open_gates(tiny.build()))
    inputs, more = tiny.batch(model, (1,)), tiny.batch(model, (1, 2))
    with capturing(model) as made:
        for x, length in ((inputs, 5), (inputs, 6), (more, 5), (inputs, 20), (inputs, 5)):
            options = {"max_new_tokens": length, "do_sample": False}
            assert torch.equal(model.generate(**x, **options, **STATIC), model.generate(**x, **options))
        assert [(step.rows, step.length) for step in made] == [(1, 16), (2, 16), (1, 32)]
        weight = next(model.lang_model.parameters())
        weight.data = weight.data * 1.5
        assert torch.equal(model.generate(**inputs, **NEW, **STATIC), model.generate(**inputs, **NEW))
        assert len(made) == 4
        assert copy.deepcopy(model).static_step is None


def test_own_caches_stay_with_transformers():
    model = tiny.open_gates(tiny.build())
    inputs = tiny.batch(model, (1,))
    cache = StaticCache(config=model.lang_model.config, max_cache_len=64)
    with capturing(model) as made:
        found = model.generate(**inputs, **NEW, **{model.lm_interface.cache_name: cache})
        assert not made and int(cache.get_seq_length()) == found.shape[1] - 1
        assert torch.equal(found, model.generate(**inputs, **NEW))
