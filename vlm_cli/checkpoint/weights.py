"""Load trained weights of a whole model over a composition, and account for every tensor (`vlm build --weights`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlm_cli.checkpoint.published.checkpoint import PublishedCheckpoint
from vlm_cli.checkpoint.published.fill import FillPlan, KeyReport, plan_fill
from vlm_cli.checkpoint.published.layouts.own import own_targets_of
from vlm_cli.errors import CheckpointError
from vlm_cli.lookalike import find_named
from vlm_cli.modeling.vlm import VLM

__all__ = ["load_weights", "open_weights", "plan_weights"]


def open_weights(path: Path) -> PublishedCheckpoint:
    """Open a weight file: `.safetensors`, or a PyTorch file (`.pt`, `.pth`, `.bin`) that holds nothing but tensors.

    Raises:
        CheckpointError: if it cannot be read. Code inside a file is never run.
    """
    path = find_named(path)
    if not path.is_file():
        raise CheckpointError(f"there is no weight file {str(path)!r}.")
    return PublishedCheckpoint.open(str(path))


def plan_weights(model: VLM, weights: PublishedCheckpoint, *, random_parts: Iterable[str] = ()) -> FillPlan:
    """Compare a weight file with a model.

    A frozen tensor of a pretrained part may be absent from the file. A tensor that trains may not.

    Args:
        model: the composition; its weights may be on the meta device.
        weights: names as vlm writes them, or as open_flamingo's branch `reduce-scope-mllm` does.
        random_parts: names from `PARTS` of backbones with random weights, so that the file must bring them.

    Raises:
        CheckpointError: if the file's weights are quantized.
    """
    parameters = model.state_dict(keep_vars=True)
    random = tuple(VLM.PART_PREFIXES[part] for part in random_parts)
    plan = plan_fill(
        model,
        weights,
        own_targets_of,
        has_weights=lambda name: not parameters[name].requires_grad and not name.startswith(random),
    )
    # A tied tensor counts under the names that the file has for it, so that "loaded" counts the file's tensors.
    named = {target.target for targets in plan.targets.values() for target in targets}
    plan.report.loaded[:] = [name for name in plan.report.loaded if name in named]
    return plan


def load_weights(model: VLM, path: Path, *, random_parts: Iterable[str] = ()) -> KeyReport:
    """Load a weight file over a model, and return what became of each tensor.

    The model stays unchanged if the report is not complete, or if the model is on the meta device.

    Args:
        model: the composition.
        path: the weight file.
        random_parts: names from `PARTS` of backbones with random weights, so that the file must bring them.

    Raises:
        CheckpointError: if the file cannot be read, or its weights are quantized.
    """
    weights = open_weights(path)
    plan = plan_weights(model, weights, random_parts=random_parts)
    if plan.report.is_complete and model.device.type != "meta":
        plan.copy(weights)
    return plan.report
