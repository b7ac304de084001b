"""The costs of prompts, counted on shapes, are those that torch's own counter finds in real runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.support import tiny
from vlm_cli.costs.prompts import PromptCost, count_prompt
from vlm_cli.costs.workload import Workload, measure_medium
from vlm_cli.errors import PromptError, UsageError
from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.vlm import VLM


def count(model: VLM, workload: Workload) -> PromptCost:
    """Count on a model of shapes that has the same configuration."""
    with meta_device():
        shapes = VLM(model.config).eval()
    return count_prompt(shapes, workload)


@contextmanager
def plain_products() -> Iterator[None]:
    """Let a CPU compute in products that torch's counter knows: it passes over the fused kernels of a CPU."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def run(model: VLM, inputs: dict[str, Any], new_tokens: int) -> int:
    """Count the operations of a real answer with torch's counter."""
    model.requires_grad_(False)  # the counter follows modules, and fails on parameters that train without gradients
    if model.lang_model._can_set_experts_implementation():
        model.lang_model.set_experts_implementation("batched_mm")  # the counter passes over grouped products
    with plain_products(), FlopCounterMode(display=False) as counter:
        model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    return counter.get_total_flops()


def prompt(model: VLM, workload: Workload) -> dict[str, Any]:
    """A real prompt of a workload, whose media all differ."""
    lang_x = torch.full((workload.rows, workload.tokens), 5)
    lang_x[:, : workload.pictures] = tiny.IMAGE
    size = measure_medium(model, workload)
    media = (workload.rows, workload.pictures)
    pixels = torch.randn(*media, size.num_frames, 3, *model.vision_encoder.image_size)
    grid = {"vision_grid": torch.tensor(size.grid).expand(*media, -1)} if size.rows else {}
    return {"lang_x": lang_x} | ({"vision_x": pixels} | grid if workload.pictures else {})


@pytest.mark.sample(4)
@pytest.mark.parametrize("parts", tiny.covering(), ids="-".join)
def test_operations_are_those_of_a_real_run(parts: tuple[str, str, str, str]) -> None:
    model, workload = tiny.build(*parts), Workload(pictures=2, text=9)
    inputs = prompt(model, workload)
    first, both = run(model, inputs, 1), run(model, inputs, 2)
    cost = count(model, workload)
    assert (cost.flops.total, cost.flops.decode) == (first, both - first)
    assert count(model, Workload(pictures=2, text=10)).flops.total != first


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
    assert count(model, workload).flops.total == run(model, prompt(model, workload), 1)


def test_positions_and_bytes_are_those_of_the_cache() -> None:
    model = tiny.build("vit", "linear", "language-stream", "llama")
    inputs = prompt(model, Workload(pictures=2, text=9))
    cost = count(model, Workload(pictures=2, text=9))
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
        count(model, Workload(tiles=3))
    with pytest.raises(UsageError, match="exclude each other"):
        Workload(size=(640, 480), frames=2)
    with pytest.raises(UsageError, match="text must be at least 1"):
        Workload(text=0)
    limited = tiny.build("vit", tiny.TOKENIZERS["perceiver"] | {"max_num_frames": 2}, "cross-attention", "llama")
    with pytest.raises(PromptError, match="has a medium of 3 frames"):
        count(limited, Workload(frames=3))


def test_a_prompt_longer_than_the_context_is_counted_and_said_not_to_fit() -> None:
    model = tiny.build("vit", "linear", "language-stream", "llama")
    assert not count(model, Workload(text=127)).fits  # of 128 positions
    assert count(model, Workload(text=120)).fits
