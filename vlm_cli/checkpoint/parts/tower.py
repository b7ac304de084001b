"""A vision encoder that was found: its configuration, and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OutsideWeights", "PublishedWeights", "Tower", "TowerWeights", "WeightsFile"]


@dataclass(frozen=True)
class WeightsFile:
    """Weights of one of OpenCLIP's towers, in a file on this machine."""

    path: Path


@dataclass(frozen=True)
class PublishedWeights:
    """Weights of one of OpenCLIP's towers, on the network or in a cache.

    Attributes:
        record: OpenCLIP's record of a pretrained tag, with `url` or `hf_hub` among its keys.
    """

    record: dict[str, Any]


@dataclass(frozen=True)
class OutsideWeights:
    """Weights of an encoder of another package.

    Attributes:
        argument: what the encoder's `load_pretrained` takes.
    """

    argument: str


TowerWeights = WeightsFile | PublishedWeights | OutsideWeights


@dataclass(frozen=True)
class Tower:
    """A tower that was found.

    Attributes:
        config: of one of OpenCLIP's towers `embed_dim`, `vision_cfg`, `quick_gelu`, `preprocess`, and `depth` if only
            so many layers are kept. Of an encoder of another package `type`, its registered name, `vision_cfg`,
            `preprocess`, and whatever else its `configure` gave.
        model_config: OpenCLIP's configuration of the whole model, text tower included; empty for another package's.
        weights: where the weights are; None for random weights.
    """

    config: dict[str, Any]
    model_config: dict[str, Any] = field(repr=False)
    weights: TowerWeights | None = None

    @property
    def is_outside(self) -> bool:
        """Whether another package brings the encoder."""
        return "type" in self.config
