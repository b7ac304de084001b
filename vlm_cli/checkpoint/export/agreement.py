"""Compare what an export gives with what the model gives, before the export gets its name."""

from __future__ import annotations

from torch import Tensor

from vlm_cli.errors import CheckpointError

__all__ = ["TOLERANCE", "check_agreement"]

TOLERANCE = 1e-4  # of outputs in float32, as a fraction of the largest output where that is above 1


def check_agreement(what: str, expected: Tensor, found: Tensor, tolerance: float = TOLERANCE) -> float:
    """Return the largest difference between two outputs, as a fraction of the largest expected one if that is above 1.

    Args:
        what: the export, in words.
        expected: output of the model.
        found: output of the export.
        tolerance: the largest difference that is allowed.

    Raises:
        CheckpointError: if the difference is larger, or an output is not finite.
    """
    if expected.shape != found.shape:
        raise CheckpointError(
            f"{what} gives {list(found.shape)}, the model {list(expected.shape)}. Nothing was written."
        )
    difference = ((expected - found).abs().max() / expected.abs().max().clamp(min=1)).item()
    if not difference <= tolerance:  # a comparison with NaN is never true
        raise CheckpointError(
            f"{what} differs from the model by {difference:.1e}, more than {tolerance:.0e}. Nothing was written; "
            "please report it with the composition."
        )
    return difference
