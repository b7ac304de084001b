"""Make a delta directory whole: write all of its tensors, with the record and the card that it has."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_cli.checkpoint.directory import load, read_config
from vlm_cli.checkpoint.published.importing import CompositionOver
from vlm_cli.checkpoint.run_record import copy_run_record, keep_card, read_story
from vlm_cli.checkpoint.saving import save
from vlm_cli.composition import Composition
from vlm_cli.errors import UsageError
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.report.card import UNTRAINED

__all__ = ["is_delta", "load_delta", "merging_command", "write_whole"]


def load_delta(
    source: str,
    composition_over: CompositionOver | None,
    *,
    revision: str | None,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
) -> tuple[VLM, VLMProcessor]:
    """Load the model of a delta directory.

    Args:
        source: directory or hub id.
        composition_over: as of `build_from_checkpoint`; it may change nothing.
        revision: branch, tag or commit, if `source` is a hub id.
        dtype: of all weights; "auto" keeps that of the files.
        trust_remote_code: whether the language model's own code may run.

    Raises:
        UsageError: if the composition is to change, or the model has adapters.
        VLMError: if a part cannot be found.
    """
    config = read_config(source, trust_remote_code=trust_remote_code, revision=revision)
    if config.adapters:
        raise UsageError(f"{source!r} has adapters. Merge them: {merging_command(source)}")
    own = config.composition
    if _changed(own, composition_over) != own:
        raise UsageError(
            f"{source!r} is a delta directory, of which no part can be replaced. Make it whole first: vlm build WHOLE "
            f"--from {source}; then replace the part: vlm build OUT --from WHOLE …"
        )
    return load(source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)


def merging_command(source: str) -> str:
    """Return the command that makes a delta directory with adapters whole."""
    return f"vlm export {shlex.quote(source)} OUT --format merged"


def _changed(own: Composition, over: CompositionOver | None) -> Composition:
    if isinstance(over, Composition):
        return over
    if over is None or isinstance(over, Mapping):
        return Composition.compose(None, own.to_dict(), over or {})
    return over(own.to_dict())


def is_delta(config: Mapping[str, Any]) -> bool:
    """Tell whether the configuration of a directory is that of a delta directory."""
    return config.get("model_type") == "vlm" and bool(config.get("backbones") or config.get("adapters"))


def write_whole(model: VLM, processor: VLMProcessor, out: Path, source: str, *, name: str, **how: Any) -> None:
    """Write a model with all of its tensors, with the record and the card of the directory that it comes from.

    Args:
        model, processor: what is written.
        out: an existing directory.
        source: directory of the model; of a hub id, there is no record.
        name: of the model, for its card.
        how: `max_shard_size` and `shim`, as of `save`.
    """
    folder = Path(source)
    copy_run_record(folder, out)
    story = read_story(folder, model) or UNTRAINED
    save(model, processor, out, name=name, story=story, **how)
    keep_card(folder, out)
