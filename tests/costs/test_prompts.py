"""The costs of prompts, counted on shapes, are those that torch's own counter finds in real runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support import tiny
from tests.support.costs import GROWN, grown, measured_peak, plain_products, real_bytes, real_prompt, shapes_of
from tests.support.grid import first_of
from vlm_cli.costs.prompts import PromptCost, count_prompt
from vlm_cli.costs.workload import Workload
from vlm_cli.errors import PromptError, UsageError
from vlm_cli.modeling.vlm import VLM


def count_on_shapes(model: VLM, workload: Workload) -> PromptCost:
    return count_prompt(shapes_of(model).eval(), workload)


def run(model: VLM, inputs: dict[str, Any], new_tokens: int) -> int:
    """Count the operations of a real answer with torch's counter."""
    model.requires_grad_(False)  # the counter follows modules, and fails on parameters that train without gradients
    if model.lang_model._can_set_experts_implementation():
        model.lang_model.set_experts_implementation("batched_mm")  # the counter passes over grouped products
    with torch.no_grad(), plain_products(), FlopCounterMode(display=False) as counter:
        model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    return counter.get_total_flops()


@pytest.mark.sample(1)
@pytest.mark.parametrize("parts", tiny.covering(), ids="-".join)
def test_operations_are_those_of_a_real_run(parts: tuple[str, str, str, str]) -> None:
    model, workload = tiny.build(*parts), Workload(pictures=2, text=9)
    inputs = real_prompt(model, workload)
    first, both = run(model, inputs, 1), run(model, inputs, 2)
    cost = count_on_shapes(model, workload)
    assert (cost.flops.total, cost.flops.decode) == (first, both - first)
    assert count_on_shapes(model, Workload(pictures=2, text=10)).flops.total != first


PERCEIVER = ("vit", "perceiver", "cross-attention", "llama")
LINEAR = ("vit", "linear", "language-stream", "llama")
GRID = {"tiling": {"type": "grid", "max_tiles": 4, "picture_text": "<{views}>"}}
ANYRES = {"tiling": {"type": "anyres", "pinpoints": [[32, 64], [64, 32], [64, 64]]}}


@pytest.mark.parametrize(
    ("parts", "workload", "settings"),
    [
        (PERCEIVER, Workload(pictures=8, text=4), {}),  # each medium has its readers
        (PERCEIVER, Workload(pictures=0, text=4), {}),
        (LINEAR, Workload(pictures=1, text=5, frames=3, rows=2), {}),
        (LINEAR, Workload(pictures=2, text=5, tiles=4), GRID),
        (PERCEIVER, Workload(pictures=2, text=5, size=(70, 33)), GRID),
        (LINEAR, Workload(pictures=1, text=5, size=(60, 30)), ANYRES),
    ],
)
def test_so_are_those_of_other_workloads(parts: Any, workload: Workload, settings: dict[str, Any]) -> None:
    model = tiny.build(*parts, **settings)
    assert count_on_shapes(model, workload).flops.total == run(model, real_prompt(model, workload), 1)


def test_positions_and_bytes_are_those_of_the_cache() -> None:
    model = tiny.build("vit", "linear", "language-stream", "llama")
    inputs = real_prompt(model, Workload(pictures=2, text=9))
    cost = count_on_shapes(model, Workload(pictures=2, text=9))
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    layers = output.past_key_values.layers
    assert cost.positions == layers[0].keys.shape[2] == 9 + 2 * cost.vision_tokens
    assert cost.cache_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    tokens, _ = model.encode_vision(inputs["vision_x"])
    assert cost.media_bytes == tokens.nbytes


def test_a_prompt_that_cannot_be_is_refused() -> None:
    model = tiny.build("vit", "perceiver", "cross-attention", "llama")
    with pytest.raises(UsageError, match=r"cuts no picture into 3 tiles\. It can be 1"):
        count_on_shapes(model, Workload(tiles=3))
    with pytest.raises(UsageError, match="exclude each other"):
        Workload(size=(640, 480), frames=2)
    with pytest.raises(UsageError, match="text must be at least 1"):
        Workload(text=0)
    limited = tiny.build("vit", tiny.TOKENIZERS["perceiver"] | {"max_num_frames": 2}, "cross-attention", "llama")
    with pytest.raises(PromptError, match="has a medium of 3 frames"):
        count_on_shapes(limited, Workload(frames=3))


def test_a_prompt_longer_than_the_context_is_counted_and_said_not_to_fit() -> None:
    model = tiny.build("vit", "linear", "language-stream", "llama")
    assert not count_on_shapes(model, Workload(text=127)).fits  # of 128 positions
    assert count_on_shapes(model, Workload(text=120)).fits


@pytest.mark.parametrize(("fusion", "tokenizer"), [("cross-attention", "perceiver"), ("language-stream", "linear")])
@pytest.mark.parametrize("size", first_of(GROWN))
def test_memory_is_that_of_a_real_run(size: str, fusion: str, tokenizer: str) -> None:
    model = grown(size, tokenizer, fusion).requires_grad_(False)
    workload = Workload(pictures=2, text=300, rows=4)
    inputs = real_prompt(model, workload)
    measured = measured_peak(lambda: model.generate(**inputs, max_new_tokens=2, min_new_tokens=2))
    cost = count_on_shapes(model, workload)
    weights = sum(p.nbytes for p in model.parameters())
    counted = cost.peak_bytes - cost.weight_bytes
    assert abs(counted / (measured + real_bytes(inputs)) - 1) < 0.1
    assert cost.weight_bytes == pytest.approx(weights, rel=1e-3)
    assert count_on_shapes(model, Workload(pictures=2, text=400, rows=4)).peak_bytes > 1.1 * counted
