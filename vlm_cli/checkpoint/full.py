"""Load the model of a full directory: one whose own files hold every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_cli.checkpoint.inside import check_index
from vlm_cli.checkpoint.size_limits import check_files_fit, limited_size, weight_files
from vlm_cli.errors import CheckpointError, PluginError, UntrustedCodeError, explain_reading
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.trust import load_pretrained

__all__ = ["cannot_load", "load_full"]


def load_full(
    name: str, config: VLMConfig, dtype: torch.dtype | str, trust_remote_code: bool, keywords: Mapping[str, Any]
) -> VLM:
    """Load the model of a directory that holds all tensors.

    Raises:
        CheckpointError: if the files cannot be read, or do not hold exactly the model's tensors.
    """
    check_index(name, keywords)
    if "device_map" not in keywords:
        check_files_fit(name)
    quantized = getattr(config.get_text_config(), "quantization_config", None) is not None
    try:
        with limited_size(repr(name), weight_files(name), elements_per_byte=8 if quantized else 1):
            model, info = load_pretrained(
                VLM,
                name,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **keywords,
            )
    except (CheckpointError, PluginError, UntrustedCodeError):
        raise
    except Exception as error:
        raise CheckpointError(cannot_load(name, error)) from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if wrong:
        raise CheckpointError(
            f"the weights in {name!r} do not cover the model: {count_of(len(info['missing_keys']), 'tensor')} missing, "
            f"{len(info['mismatched_keys'])} of another shape, {len(info['unexpected_keys'])} not known; "
            f"e.g. {sorted(map(str, wrong))[0]}."
        )
    return model.eval()


def cannot_load(name: str, error: Exception) -> str:
    """Say that a directory or hub id cannot be loaded, and why."""
    if Path(name).is_dir():
        return f"cannot load {name!r}: {explain_reading(error)}."
    return (
        f"cannot load {name!r}: it is no directory here, and the hub did not give it ({explain_reading(error)}). Give "
        "a directory that `vlm build` wrote or a hub id; an offline machine knows only cached ones."
    )
