"""Several vision encoders at once: each is found and loaded as it would be alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_cli.checkpoint.parts.tower import SeveralWeights, Tower
from vlm_cli.composition import SeveralEncoderOptions, VisionEncoderOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["find_several_towers", "load_several_towers"]


def find_several_towers(options: SeveralEncoderOptions, find: Callable[[VisionEncoderOptions], Tower]) -> Tower:
    """Find several encoders, and put their configurations together.

    Args:
        options: of all encoders.
        find: finds one.

    Raises:
        VLMError: as of `find`.
    """
    towers = [find(x) for x in options.encoders]
    sizes = [_pair(tower.config["preprocess"]["size"]) for tower in towers]
    size = [max(height for height, _ in sizes), max(width for _, width in sizes)]
    features: list[dict[str, Any]] = [
        {
            "layer": [*x.layer] if isinstance(x.layer, tuple) else x.layer,
            **({} if x.norm is None else {"norm": x.norm}),
        }
        for x in options.encoders
    ]
    config = {
        "type": "several",
        "encoders": [{**x.config, "features": chosen} for x, chosen in zip(towers, features, strict=True)],
        "vision_cfg": {"image_size": size},
        "preprocess": {"size": size, "encoders": [tower.config["preprocess"] for tower in towers]},
    }
    has_weights = any(tower.weights is not None for tower in towers)
    notes = tuple(note for tower in towers for note in tower.notes)
    return Tower(config, {}, SeveralWeights(tuple(towers)) if has_weights else None, notes)


def load_several_towers(tower: Tower, load: Callable[[Tower], nn.Module]) -> nn.Module:
    """Load each encoder, and put them together.

    Args:
        tower: of all encoders.
        load: loads one.

    Raises:
        VLMError: as of `load`.
    """
    from vlm_cli.modeling.encoders.several import SeveralEncoders

    assert isinstance(tower.weights, SeveralWeights)
    return SeveralEncoders(tower.config, [load(x) for x in tower.weights.towers])


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)
