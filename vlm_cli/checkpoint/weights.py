"""Trained weights over a composition, and an account of every tensor.

Two layouts are read: our own names, and those of open_flamingo (branch `reduce-scope-mllm`), where added rows sit
inside the language model's tables and cross-attention blocks inside its layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.errors import CheckpointError
from vlm_cli.modeling.vlm import VLM

__all__ = ["OPEN_FLAMINGO_NAMES", "KeyReport", "load_weights", "read_weights", "translate"]

#: Names of open_flamingo -> ours: patterns of whole names, of which the first that matches is applied.
OPEN_FLAMINGO_NAMES = (
    (r"vision_encoder\.(?!visual\.)(.*)", r"vision_encoder.visual.\1"),
    (r"lang_model\..*\.additional_embedding\.(.*)", r"added_tokens.embedding.\1"),
    (r"lang_model\..*\.additional_fc\.(.*)", r"added_tokens.head.\1"),
    (r"lang_model\..*?\.(\d+)\.gated_cross_attn_layer\.(.*)", r"fusion.blocks.\1.\2"),
    (r"lang_model\.gated_cross_attn_layers\.(\d+)\.(.*)", r"fusion.blocks.\1.\2"),
    (r"(lang_model\..*?\.\d+)\.decoder_layer\.(.*)", r"\1.\2"),
)


@dataclass
class KeyReport:
    """What became of each tensor of a file and of the model.

    Attributes:
        loaded: names of the model that got a tensor.
        absent: names that the file lacks, as expected: they are frozen and come from a pretrained part.
        missing: names that the file lacks although they train, or although their part is random.
        unused: names of the file that the model does not have.
        mismatched: names with another shape, and both shapes.
    """

    loaded: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return bool(self.loaded) and not self.missing and not self.mismatched

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or of a PyTorch file that holds nothing but tensors.

    Wrappers that training code leaves (`model_state_dict`, `state_dict`, `module.`) are taken off.

    Raises:
        CheckpointError: if it cannot be read. Code inside of a file is never run.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no weight file {str(path)!r}.")
    return dict(PublishedCheckpoint.open(str(path)).read())


def translate(names: Iterable[str]) -> dict[str, str]:
    """Our name of each tensor of a file."""
    return {name: _translate(name) for name in names}


def _translate(name: str) -> str:
    for pattern, replacement in OPEN_FLAMINGO_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def load_weights(model: VLM, path: Path, *, random_parts: Iterable[str] = ()) -> KeyReport:
    """Load trained weights over a model; it is unchanged if the report is not complete.

    Args:
        model: the composition.
        path: file of weights.
        random_parts: names from `PARTS` of the pretrained parts that were drawn at random, so that the file must have
            them.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    found = read_weights(path)
    ours = translate(found)
    state = model.state_dict(keep_vars=True)
    report = KeyReport()
    loadable: dict[str, Tensor] = {}
    for name, tensor in found.items():
        target = state.get(ours[name])
        if target is None:
            report.unused.append(name)
        elif target.shape != tensor.shape:
            report.mismatched[name] = (list(tensor.shape), list(target.shape))
        else:
            loadable[ours[name]] = tensor
    report.loaded = sorted(loadable)
    # Tied weights have two names for one tensor.
    covered = {id(state[name]) for name in loadable} | {id(state[ours[name]]) for name in report.mismatched}
    random = [VLM.PART_PREFIXES[part] for part in random_parts]
    for name, target in state.items():
        if id(target) not in covered:
            needed = target.requires_grad or any(name.startswith(prefix) for prefix in random)
            (report.missing if needed else report.absent).append(name)
    if report.is_complete:
        with torch.no_grad():
            for name, tensor in loadable.items():
                state[name].copy_(tensor)
    return report
