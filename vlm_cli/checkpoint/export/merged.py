"""Merge the adapters of a model before it is exported: each is added to the weights that it stands beside."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_cli.checkpoint.create import cast
from vlm_cli.checkpoint.export.agreement import check_agreement
from vlm_cli.errors import CheckpointError, UsageError
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.vlm import VLM

__all__ = ["check_merged", "merge_and_compare"]

_TOKENS = 8  # of the text after the picture in the comparison


def check_merged(config: VLMConfig) -> None:
    """Check that there is an adapter to merge.

    Raises:
        UsageError: if there is none.
    """
    if not config.adapters:
        raise UsageError("the model has no adapter, so there is nothing to merge. Leave it as it is.")


def merge_and_compare(model: VLM) -> float:
    """Merge the adapters of a model in place, in float32, and compare logits before and after.

    Returns:
        The largest difference, as a fraction of the largest logit.

    Raises:
        CheckpointError: if the logits differ, or a merged weight is not finite.
    """
    dtype, parts = model.dtype, ", ".join(model.config.adapters)
    cast(model, torch.float32)
    inputs = _sample(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        try:
            model.merge_adapters()
        except ValueError as error:
            raise CheckpointError(f"the adapter of {parts} cannot be merged: {error}") from None
        difference = check_agreement("the merged model", expected, model(**inputs).logits)
    cast(model, dtype)
    return difference


def _sample(model: VLM) -> dict[str, Tensor]:
    """Return a picture of noise and a short text after it."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 1, model.vision_encoder.num_channels, *model.vision_encoder.image_size)
    ids = torch.randint(model.config.first_added_id, (1, _TOKENS), generator=generator)
    ids[ids == model.config.media_token_id] = 0
    media = torch.full((1, 1), model.config.media_token_id)
    return {
        "vision_x": torch.randn(shape, generator=generator).to(model.device),
        "lang_x": torch.cat([media, ids], dim=1).to(model.device),
    }
