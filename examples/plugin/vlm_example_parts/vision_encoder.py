"""A vision encoder. N frames, C H W pixels, v patches, d channels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm_example_parts import ConvPatchesOptions


class ConvPatches(nn.Module):
    """Cut an image into patches of 16 pixels, and let neighbours mix in `depth` residual convolutions."""

    @classmethod
    def configure(cls, options: ConvPatchesOptions) -> dict[str, Any]:
        """Return what `config.json` keeps: the encoder's settings, and where preprocessing differs from OpenCLIP's."""
        return {
            "vision_cfg": {"image_size": options.image_size or 224, "depth": options.depth},
            "preprocess": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        }

    def __init__(self, config: dict[str, Any], dim: int = 64, patch_size: int = 16) -> None:
        super().__init__()
        self.image_size = config["vision_cfg"]["image_size"]  # pixels
        self.stem = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(config["vision_cfg"]["depth"]))

    def load_pretrained(self, name_or_file: str) -> None:
        """Load weights from a safetensors file."""
        self.load_state_dict(load_file(name_or_file))

    def patch_features(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """Return the features of a layer, counted from the end: float[N, C, H, W] -> float[N, v, d].

        Raises:
            ValueError: if the encoder has fewer layers.
        """
        num_blocks = len(self.blocks) + 1 + layer
        if num_blocks < 0:
            raise ValueError(f"conv-patches has {len(self.blocks) + 1} layers with depth={len(self.blocks)}")
        x = self.stem(pixels)  # [N, d, H/16, W/16]
        for block in self.blocks[:num_blocks]:
            x = x + F.gelu(block(x))
        return x.flatten(2).transpose(1, 2)
