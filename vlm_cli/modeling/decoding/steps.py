"""`EagerStep`: the call of the language model between two tokens, with tensors that grow.

B rows, V columns of the logits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm_cli.modeling.conditioning import count_media

__all__ = ["EagerStep", "settle"]


def settle(model: Any, outputs: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the first step, once the prompt is read.

    No `<image>` follows, so that one number of media, int[B, 1], holds for the rest of the answer. A language model
    without a cache reads the prompt again with each token, and so needs all that the prompt needed.

    Args:
        model: the VLM.
        outputs: of the language model for the prompt.
        kwargs: of `prepare_inputs_for_generation` for the prompt.
    """
    kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
    kwargs.pop("most_readers", None)
    if model.lm_interface.cache_in(outputs) is None:
        return kwargs
    media, mask = kwargs.pop("media", None), kwargs.pop("media_mask", None)
    reads_all = bool(kwargs.pop("reads_all_media", False))
    if media is not None:
        kwargs["media"], kwargs["media_mask"] = model.decoded_media(media, mask, reads_all)
    types = kwargs.pop("mm_token_type_ids", None)
    return kwargs if types is None else kwargs | {"media_counts": count_media(types % 2, 1)[:, -1:].clone()}


class EagerStep:
    """Calls the language model as Transformers' own loop does.

    Args:
        model: the VLM.
        kwargs: what `settle` returned.
    """

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        self.model, self.kwargs = model, kwargs

    @property
    def cache(self) -> Any:
        """The language model's, after the last call."""
        return self.kwargs.get(self.model.lm_interface.cache_name)

    def __call__(self, ids: Tensor) -> Tensor:
        """int[B, L] so far -> float[B, V] logits of the next token."""
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=1, **self.kwargs)
        outputs = self.model(**inputs, return_dict=True)
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs, is_encoder_decoder=False)
        return outputs.logits[:, -1]
