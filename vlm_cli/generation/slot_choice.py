"""Whether rows may be answered in slots, and what writes and chooses their tokens there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.logits_process import (
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlm_cli.generation.slots import Chooser
from vlm_cli.modeling.acceleration import ONE_POSITION
from vlm_cli.modeling.decoding.growing_slots import GrowingSlots
from vlm_cli.modeling.decoding.slot_step import SlotStep
from vlm_cli.modeling.decoding.static import find_graph
from vlm_cli.modeling.decoding.static_slots import StaticSlots
from vlm_cli.modeling.generation import ForbidToken
from vlm_cli.modeling.language_model import NO_LEFT_PADDING

if TYPE_CHECKING:
    from vlm_cli.generation.plan import GenerationPlan
    from vlm_cli.modeling.vlm import VLM

__all__ = ["find_setting_problem", "find_slot_problem", "make_chooser", "make_step"]

#: Logits processors that look at a row's logits and at none of its tokens.
_OF_LOGITS = (
    ForbidToken,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

#: Attention that a mask keeps from columns that are not written yet; flash attention would read them.
_MASKED = (None, "eager", "sdpa", ONE_POSITION)


def find_slot_problem(model: VLM) -> str | None:
    """Say why a row cannot take the place of another one in the middle of a batch; None if it can."""
    kind, cache = model.lang_model.config.model_type, model.generation_config.cache_implementation
    if not model.media_may_be_padded:
        return (
            f"the fusion {model.config.composition.fusion.type!r} does not say how to put a row's media beside others"
        )
    if kind in NO_LEFT_PADDING:
        return f"a language model of type {kind} cannot read rows that are padded at the left"
    if cache is not None and not _is_static(model):
        return f"a language model of type {kind} has no place for rows in its cache of the kind {cache!r}"
    if model.lang_model._is_stateful and not _is_static(model):
        return f"a language model of type {kind} has a state in which rows cannot be replaced"
    return None


def find_setting_problem(plan: GenerationPlan) -> str | None:
    """Say why settings keep the rows of a batch together; None if they do not."""
    keywords = plan.keywords
    if max(keywords["num_beams"], keywords["num_return_sequences"]) > 1:
        return "beams, or several answers to a row, go on until the last of them ends"
    if keywords["repetition_penalty"] != 1:
        return "a repetition penalty looks at all tokens of a row"
    others = [type(x).__name__ for x in _find_processors(plan) if type(x) not in _OF_LOGITS]
    return f"{others[0]} looks at more than the logits of a token" if others else None


def make_step(model: VLM) -> SlotStep:
    """Make what writes one token of each slot: in a static cache on a GPU, or where the model is to have one."""
    if not _is_static(model):
        return GrowingSlots(model)
    compiling: Any = model.generation_config.compile_config
    if compiling is None:
        return StaticSlots(model, graph=find_graph(model, None))
    return StaticSlots(model, forward=model.get_compiled_call(compiling), graph=find_graph(model, compiling.mode))


def _is_static(model: VLM) -> bool:
    """Say whether the cache is static. A graph can hold neither several devices nor hooks that load weights."""
    wanted, lm = model.generation_config.cache_implementation, model.lang_model
    if wanted not in (None, "static") or not lm._can_compile_fullgraph:
        return False
    if lm.config._attn_implementation not in _MASKED:
        return False
    places = getattr(model, "hf_device_map", None) or {}
    return wanted == "static" or (model.device.type == "cuda" and len(set(places.values())) <= 1)


def make_chooser(plan: GenerationPlan, seed: int | None) -> Chooser:
    """Make what chooses tokens as `VLM.generate` would, for settings without a problem."""
    return Chooser(_find_processors(plan), do_sample=bool(plan.keywords["do_sample"]), seed=seed)


def _find_processors(plan: GenerationPlan) -> LogitsProcessorList:
    """Find what changes logits between the language model and the choice."""
    model: Any = plan.model
    config, _ = model._prepare_generation_config(None, **plan.keywords)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
    processors: LogitsProcessorList = model._get_logits_processor(
        config,
        input_ids_seq_length=1,
        prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList([ForbidToken(model.config.media_token_id)]),
        device=model.device.type,
    )
    return processors
