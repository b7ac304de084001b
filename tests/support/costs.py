"""Real runs, measured, to compare counted costs with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from tests.support import tiny
from vlm_cli.costs.workload import Workload, measure_medium
from vlm_cli.modeling.meta import meta_device
from vlm_cli.modeling.vlm import VLM

#: Width and layers of a language model large enough for its memory to be measured, of three sizes.
GROWN = {"small": (128, 2), "middle": (256, 4), "large": (512, 6)}


def grown(size: str, tokenizer: str, fusion: str) -> VLM:
    """A model with a language model of one of the sizes."""
    width, layers = GROWN[size]
    name = f"llama-{width}"
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    sizes |= {"head_dim": width // 4, "max_position_embeddings": 2048}
    tiny.LANGUAGE_MODELS[name] = tiny.LANGUAGE_MODELS["llama"] | sizes
    try:
        return tiny.build("vit", tokenizer, fusion, name)
    finally:
        del tiny.LANGUAGE_MODELS[name]  # other tests go through all of them


def real_bytes(inputs: Mapping[str, Any]) -> int:
    """The bytes of a prompt's tensors, which exist before it is measured."""
    return sum(x.nbytes for x in inputs.values())


def shapes_of(model: VLM) -> VLM:
    """A model of shapes that has the same configuration."""
    with meta_device():
        return VLM(copy.deepcopy(model.config))


def real_prompt(model: VLM, workload: Workload) -> dict[str, Any]:
    """A real prompt of a workload, whose media all differ."""
    lang_x = torch.full((workload.rows, workload.tokens), 5)
    lang_x[:, : workload.pictures] = tiny.IMAGE
    size = measure_medium(model, workload)
    media = (workload.rows, workload.pictures)
    pixels = torch.randn(*media, size.num_frames, 3, *model.vision_encoder.image_size)
    grid = {"vision_grid": torch.tensor(size.grid).expand(*media, -1)} if size.rows else {}
    return {"lang_x": lang_x} | ({"vision_x": pixels} | grid if workload.pictures else {})


@contextmanager
def plain_products() -> Iterator[None]:
    """Let a CPU compute in products that torch's counter knows: it passes over the fused kernels of a CPU."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def measured_peak(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had given out while something ran, over those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    now = peak = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
