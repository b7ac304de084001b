"""A vision encoder that was found: its configuration, and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OutsideWeights", "PublishedWeights", "RepositoryWeights", "SeveralWeights", "Tower"]
__all__ += ["TowerWeights", "WeightsFile"]


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


@dataclass(frozen=True)
class RepositoryWeights:
    """Weights of a vision model of Transformers, in a directory or a repository of the hub.

    Attributes:
        location: directory or hub id.
        revision: branch, tag or commit of the hub id; None for the newest.
    """

    location: str
    revision: str | None = None


@dataclass(frozen=True)
class SeveralWeights:
    """Weights of several encoders.

    Attributes:
        towers: each encoder, with its own weights.
    """

    towers: tuple[Tower, ...]


TowerWeights = WeightsFile | PublishedWeights | OutsideWeights | RepositoryWeights | SeveralWeights


@dataclass(frozen=True)
class Tower:
    """A tower that was found.

    Attributes:
        config: of one of OpenCLIP's towers `embed_dim`, `vision_cfg`, `quick_gelu`, `preprocess`, and `depth` if only
            so many layers are kept. Of an encoder of another package `type`, its registered name, `vision_cfg`,
            `preprocess`, and whatever else its `configure` gave. Of a vision model of Transformers `type`, `config`,
            `vision_cfg` and `preprocess`.
        model_config: OpenCLIP's configuration of the whole model, text tower included; empty for another package's.
        weights: where the weights are; None for random weights.
        notes: sentences that the user should read.
    """

    config: dict[str, Any]
    model_config: dict[str, Any] = field(repr=False)
    weights: TowerWeights | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_outside(self) -> bool:
        """Whether another package brings the encoder."""
        return "type" in self.config
