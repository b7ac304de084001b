"""Three parts for `vlm`: their names and settings. The modules beside this one hold the parts themselves.

`vlm` imports this file whenever it uses one of the names, in `vlm list` too, so this file does not import torch.
"""

from dataclasses import dataclass

from vlm_cli.composition import VisionEncoderOptions
from vlm_cli.errors import CompositionError
from vlm_cli.registry import RegisteredPart

__all__ = ["CONV_PATCHES", "GRID_POOLING", "RUNNING_MEAN"]


@dataclass(frozen=True, kw_only=True)
class ConvPatchesOptions(VisionEncoderOptions):
    """Settings of `ConvPatches`."""

    depth: int = 2  # convolutions after the one that makes patches

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 0:
            raise CompositionError(f"depth must be at least 0, got {self.depth}.")


@dataclass(frozen=True, kw_only=True)
class GridPoolingOptions:
    """Settings of `GridPooling`."""

    side: int = 2  # side² vision tokens for each frame
    dim_out: int | None = None  # output channels; None: the width that the fusion asks for

    def __post_init__(self) -> None:
        if self.side < 1:
            raise CompositionError(f"side must be at least 1, got {self.side}.")


@dataclass(frozen=True, kw_only=True)
class RunningMeanOptions:
    """Settings of `VLMWithRunningMean`."""

    bias: bool = True  # of the projection


CONV_PATCHES = RegisteredPart(
    "conv-patches",
    "vlm_example_parts.vision_encoder:ConvPatches",
    "vlm_example_parts:ConvPatchesOptions",
    "patches of 16 pixels and a few 3×3 convolutions among them",
)
GRID_POOLING = RegisteredPart(
    "grid-pooling",
    "vlm_example_parts.vision_tokenizer:GridPooling",
    "vlm_example_parts:GridPoolingOptions",
    "averages the grid of patches to side × side vision tokens",
)
RUNNING_MEAN = RegisteredPart(
    "running-mean",
    "vlm_example_parts.fusion:VLMWithRunningMean",
    "vlm_example_parts:RunningMeanOptions",
    "adds the mean of the media so far to the text's embeddings, through a gate",
)
