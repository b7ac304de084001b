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
from transformers import GenerationConfig, StoppingCriteria
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from vlm_cli.modeling.decoding.choosing import are_numbers, choose
from vlm_cli.modeling.decoding.rows import GrowingRows, may_wait

__all__ = ["decode", "fits"]

LOOK_EVERY = 8  # tokens between two looks of the host at a device that is not a CPU


def fits(
    config: GenerationConfig, criteria: Sequence[StoppingCriteria], *, synced_gpus: bool, kwargs: dict[str, Any]
) -> bool:
    """Say whether `decode` gives what these settings ask for; Transformers' own loop gives everything."""
    has_length = any(isinstance(x, MaxLengthCriteria) for x in criteria)
    gives_details = config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
    is_plain = not (synced_gpus or gives_details or getattr(config, "is_assistant", False))
    return is_plain and has_length and bool(kwargs.get("use_cache"))


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
    forward: Any = (
        model.get_compiled_call(config.compile_config)
        if model._valid_auto_compile_criteria(kwargs, config)
        else model.__call__
    )
    details: dict[str, list[Tensor]] = {}
    if config.return_dict_in_generate:
        details = {name: [] for name in ("scores", "logits") if getattr(config, f"output_{name}")}
    outputs = model._prefill(ids, config, kwargs, is_first_iteration=True)
    cache = model.lm_interface.cache_in(outputs)
    pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    pad = config._pad_token_tensor.to(ids.device) if pads else None
    every = _look_every(model, [*processors, *criteria], cache if config.return_dict_in_generate else None)
    rows = GrowingRows(ids, criteria, pad, every, streamer)
    with model._optimize_model_for_decode():
        while True:
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
            # A copy, so that the logits of all positions of a prompt may be freed.
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)
            scores = processors(rows.ids, logits)  # type: ignore[arg-type]
            for name, values in details.items():
                values.append(scores if name == "scores" else logits)
            told = tuple(details["scores"]) if "scores" in details else None
            is_sound = are_numbers(scores) if config.do_sample else None
            rows.add(choose(scores, do_sample=config.do_sample), told, is_sound)
            del outputs
            if rows.is_due() and rows.look():
                break
            inputs = model.prepare_inputs_for_generation(rows.ids, next_sequence_length=1, **kwargs)
            outputs = forward(**inputs, return_dict=True)
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return rows.ids.clone()
    return _with_details(model, rows, details, kwargs)


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


def _with_details(
    model: Any, rows: GrowingRows, details: dict[str, list[Tensor]], kwargs: dict[str, Any]
) -> GenerateDecoderOnlyOutput:
    """Return what `return_dict_in_generate` asks for, as of the end of all rows."""
    cache = kwargs.get(model.lm_interface.cache_name)
    if rows.surplus and cache is not None:
        cache.crop(-rows.surplus)
    kept = {name: tuple(values[: len(values) - (rows.surplus or 0)]) for name, values in details.items()}
    names = {field.name for field in fields(GenerateDecoderOnlyOutput)}
    cache_name = next(name for name in ("cache", "past_key_values") if name in names)
    return GenerateDecoderOnlyOutput(sequences=rows.ids.clone(), **kept, **{cache_name: cache})  # type: ignore[arg-type]
