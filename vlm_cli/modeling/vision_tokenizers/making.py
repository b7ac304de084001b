"""Make the vision tokenizer of a configuration."""

from __future__ import annotations

import inspect
from typing import Any

from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.towers import find_grid
from vlm_cli.registry import VISION_TOKENIZERS

__all__ = ["make_vision_tokenizer"]


def make_vision_tokenizer(config: VLMConfig, media_width: int | None) -> Any:
    """Build the composition's vision tokenizer for the features of its vision encoder.

    Args:
        config: of the model.
        media_width: channels that the fusion needs; None for any. `vision_tokenizer.dim_out` wins.
    """
    parts, vision = config.composition, config.vision_config
    options = parts.vision_tokenizer.options
    tokenizer = VISION_TOKENIZERS[parts.vision_tokenizer.type].load()
    sizes: dict[str, Any] = {
        "dim_in": vision["dim"],
        "num_patches": vision["num_patches"],
        "dim_out": media_width if options.dim_out is None else options.dim_out,
    }
    if "grid" in inspect.signature(tokenizer).parameters:  # a tokenizer of another package may do without
        sizes["grid"] = find_grid(vision, vision["num_patches"], parts.vision_encoder.feature_arguments["class_token"])
    return tokenizer(options, **sizes)
