"""Several vision encoders that read the same image, side by side: their channels are concatenated on one grid.

Prismatic and OpenVLA (https://arxiv.org/abs/2402.07865) read DINOv2 and SigLIP so. Each encoder gets pixels of its own
size and normalisation: image i stands in channels 3·i to 3·i + 2, at the top left if other encoders read larger images.

N images, C H W pixels, v patches, d channels, k encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_cli.errors import VisionEncoderError
from vlm_cli.modeling.encoders.structure import infer_grid
from vlm_cli.modeling.towers import build_tower, find_image_size, patch_features

__all__ = ["SeveralEncoders"]


class SeveralEncoders(nn.Module):
    """Concatenate the channels of several encoders; a finer grid is averaged down to the coarsest.

    Args:
        vision_config: `encoders`, the configuration of each, with `features`: its layer, and whether its norm applies.
        encoders: encoders that are loaded; None builds them with random weights.
    """

    has_feature_settings = True

    def __init__(self, vision_config: Mapping[str, Any], encoders: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        settings = vision_config["encoders"]
        self.encoders = nn.ModuleList([build_tower(x) for x in settings] if encoders is None else encoders)
        self.features = [_read_features(x.get("features", {})) for x in settings]
        self.sizes = [find_image_size(x) for x in self.encoders]
        self.image_size = (max(height for height, _ in self.sizes), max(width for _, width in self.sizes))
        self.num_channels = 3 * len(self.encoders)

    def patch_features(self, pixels: Tensor, layer: int = -1, **_: Any) -> Tensor:
        """float[N, 3·k, H, W] -> float[N, v, d]; each encoder has a layer of its own.

        Raises:
            VisionEncoderError: if the grids cannot be brought together.
        """
        found, grids = [], []
        for i, (encoder, (height, width)) in enumerate(zip(self.encoders, self.sizes, strict=True)):
            own = pixels[:, 3 * i : 3 * i + 3, :height, :width].clone()  # a tracer cannot detach a view
            x = patch_features(encoder, own, **self.features[i])
            grid = infer_grid(x.shape[1], (height, width))
            if grid is None:
                raise VisionEncoderError(f"the {x.shape[1]} features of encoder {i + 1} form no grid of patches.")
            found.append(x)
            grids.append(grid)
        target = min(grids, key=lambda grid: grid[0] * grid[1])
        return torch.cat([_pool(x, grid, target, grids) for x, grid in zip(found, grids, strict=True)], dim=-1)


def _read_features(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `patch_features`; JSON has lists of layers."""
    layer = settings.get("layer", -1)
    return {"layer": tuple(layer) if isinstance(layer, list) else layer, "norm": settings.get("norm")}


def _pool(x: Tensor, grid: tuple[int, int], target: tuple[int, int], grids: Sequence[tuple[int, int]]) -> Tensor:
    """Average float[N, v, d] over the patches that lie in one patch of the target.

    Raises:
        VisionEncoderError: if the target's patches do not hold whole patches.
    """
    if grid == target:
        return x
    if grid[0] % target[0] or grid[1] % target[1]:
        sizes = " and ".join(f"{rows} x {columns}" for rows, columns in grids)
        raise VisionEncoderError(
            f"the grids of the encoders cannot be brought together: they have {sizes} patches, and each must be a "
            "multiple of the smallest. Give one of them another image_size."
        )
    rows, columns = grid[0] // target[0], grid[1] // target[1]
    split = x.unflatten(1, (target[0], rows, target[1], columns))
    return split.mean((2, 4)).flatten(1, 2)
