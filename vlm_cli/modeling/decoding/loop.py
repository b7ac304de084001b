"""Greedy and sampled answers: the loop between the language model's calls.

Transformers prepares what the loop gets: logits processors, stopping criteria, the cache. Its own loop looks at each
token to see whether all rows are over, so that a GPU waits for the host after each token, and the host for the GPU.

B rows, L positions of the language model, V columns of the logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache, StoppingCriteria
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from vlm_cli.modeling.decoding.choosing import are_numbers, choose
from vlm_cli.modeling.decoding.rows import GrowingRows, may_wait
from vlm_cli.modeling.decoding.static import StaticStep, find_graph
from vlm_cli.modeling.decoding.steps import EagerStep, settle

__all__ = ["decode", "fits"]

LOOK_EVERY = 8  # tokens between two looks of the host at a device that is not a CPU


def fits(
    config: GenerationConfig, criteria: Sequence[StoppingCriteria], *, synced_gpus: bool, kwargs: dict[str, Any]
) -> bool:
    """Say whether `decode` gives what these settings ask for; Transformers' own loop gives everything."""
    has_length = any(isinstance(x, MaxLengthCriteria) for x in criteria)
    gives_details = config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
    is_plain = not (synced_gpus or gives_details or getattr(config, "is_assistant", False))
    caches = [x for x in kwargs.values() if isinstance(x, StaticCache)]
    is_own = all(type(x) is StaticCache and not _is_given(x) and not x.offloading for x in caches)
    reads_at_once = not caches or config.prefill_chunk_size is None
    return is_plain and has_length and is_own and reads_at_once and bool(kwargs.get("use_cache"))


def _is_given(cache: Any) -> bool:
    """Say whether the caller of `generate` made a cache, and so may read it afterwards."""
    return bool(getattr(cache, "_is_user_defined", False))


def decode(
    model: Any,
    ids: Tensor,
    *,
    processors: LogitsProcessorList,
    criteria: Sequence[StoppingCriteria],
    config: Any,
    streamer: Any,
    kwargs: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput:
    """Continue prompts; the result is that of Transformers' `_sample`.

    Args:
        model: the VLM.
        ids: int[B, L] of the prompts.
        processors: change the logits.
        criteria: end rows.
        config: with all settings.
        streamer: receives tokens; may be None.
        kwargs: of `prepare_inputs_for_generation`.
    """
    details: dict[str, list[Tensor]] = {}
    if config.return_dict_in_generate:
        details = {name: [] for name in ("scores", "logits") if getattr(config, f"output_{name}")}
    static = find_static_step(model, ids, config, kwargs)
    if static is not None:
        kwargs[model.lm_interface.cache_name] = static.cache
    outputs = model._prefill(ids, config, kwargs, is_first_iteration=True)
    logits = outputs.logits[:, -1].clone()  # the other positions' may be freed
    kwargs = settle(model, outputs, kwargs)
    del outputs
    step: Any = EagerStep(model, kwargs) if static is None else static
    if static is not None:
        static.begin(kwargs)
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    pad = config._pad_token_tensor.to(ids.device) if pads else None
    returned = step.cache if config.return_dict_in_generate or _is_given(step.cache) else None
    every = _look_every(model, [*processors, *criteria], returned)
    rows = GrowingRows(ids, criteria, pad, every, streamer)
    with model._optimize_model_for_decode():
        while True:
            logits = logits.to(copy=True, dtype=torch.float32, device=ids.device)
            scores = processors(rows.ids, logits)  # type: ignore[arg-type]
            for name, values in details.items():
                values.append(scores if name == "scores" else logits)
            told = tuple(details["scores"]) if "scores" in details else None
            is_sound = are_numbers(scores) if config.do_sample else None
            rows.add(choose(scores, do_sample=config.do_sample), told, is_sound)
            if rows.is_due() and rows.look():
                break
            logits = step(rows.ids)
    if streamer is not None:
        streamer.end()
    if rows.surplus and returned is not None:
        step.cache.crop(-rows.surplus)
    if not config.return_dict_in_generate:
        model.static_step = static or model.static_step  # otherwise the cache is the caller's
        return rows.ids.clone()
    return _with_details(rows, details, step.cache)


def find_static_step(model: Any, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> StaticStep | None:
    """Return the step of an earlier answer or a new one, if a static cache is asked for; None otherwise.

    Args:
        model: the VLM, which keeps one step.
        ids: int[B, L] of the prompts.
        config: the settings.
        kwargs: with the cache that Transformers made.
    """
    if not isinstance(kwargs.get(model.lm_interface.cache_name), StaticCache):
        return None
    compiles = model._valid_auto_compile_criteria(kwargs, config)
    forward = model.get_compiled_call(config.compile_config) if compiles else model.__call__
    step: StaticStep | None = model.static_step
    model.static_step = None  # an error may leave it in the middle of an answer
    if step is None or not step.serves(forward, len(ids), config.max_length):
        mode = getattr(config.compile_config, "mode", "reduce-overhead") if compiles else None
        step = StaticStep(model, forward, len(ids), config.max_length, find_graph(model, mode))
    step.reset()
    return step


def _look_every(model: Any, parts: Iterable[LogitsProcessor | StoppingCriteria], returned: Any) -> int:
    """Return how many tokens may come between two looks.

    Args:
        model: the VLM.
        parts: those that are neither Transformers' nor known to wait may read tokens on the host.
        returned: a cache that the caller gets, from which the surplus must be taken off; None for none.
    """
    every = model.look_every or (1 if model.device.type == "cpu" else LOOK_EVERY)
    known = all(type(x).__module__.startswith("transformers.") or may_wait(x) for x in parts)
    layers = getattr(returned, "layers", () if returned is None else (None,))
    return every if known and all(type(layer) in (DynamicLayer, StaticLayer) for layer in layers) else 1


def _with_details(rows: GrowingRows, details: dict[str, list[Tensor]], cache: Any) -> GenerateDecoderOnlyOutput:
    """Return what `return_dict_in_generate` asks for, as of the end of all rows."""
    kept = {name: tuple(values[: len(values) - (rows.surplus or 0)]) for name, values in details.items()}
    names = {field.name for field in fields(GenerateDecoderOnlyOutput)}
    cache_name = next(name for name in ("cache", "past_key_values") if name in names)
    return GenerateDecoderOnlyOutput(sequences=rows.ids.clone(), **kept, **{cache_name: cache})  # type: ignore[arg-type]
