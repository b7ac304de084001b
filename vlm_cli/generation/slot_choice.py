"""Whether rows may be answered in slots, and how their tokens are chosen there."""

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
from vlm_cli.modeling.generation import ForbidToken
from vlm_cli.modeling.language_model import NO_LEFT_PADDING

if TYPE_CHECKING:
    from vlm_cli.generation.plan import GenerationPlan
    from vlm_cli.modeling.vlm import VLM

__all__ = ["find_slot_problem", "make_chooser"]

#: Logits processors that look at a row's logits and at none of its tokens.
_OF_LOGITS = (
    ForbidToken,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def find_slot_problem(model: VLM) -> str | None:
    """Say why a row cannot take the place of another one in the middle of a batch; None if it can."""
    kind = model.lang_model.config.model_type
    if not model.media_may_be_padded:
        return (
            f"the fusion {model.config.composition.fusion.type!r} does not say how to put a row's media beside others"
        )
    if kind in NO_LEFT_PADDING:
        return f"a language model of type {kind} cannot read rows that are padded at the left"
    if model.lang_model._is_stateful or model.generation_config.cache_implementation is not None:
        return f"a language model of type {kind} has a state in which rows cannot be replaced"
    return None


def make_chooser(plan: GenerationPlan, seed: int | None) -> Chooser | None:
    """Make what chooses tokens as `VLM.generate` would; None if that takes more than the logits of a row."""
    model: Any = plan.model
    config, _ = model._prepare_generation_config(None, **plan.keywords)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
    processors = model._get_logits_processor(
        config,
        input_ids_seq_length=1,
        prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList([ForbidToken(model.config.media_token_id)]),
        device=model.device.type,
    )
    if not all(type(processor) in _OF_LOGITS for processor in processors):
        return None
    return Chooser(processors, do_sample=bool(config.do_sample), seed=seed)
