"""`VisionEncoder`: a tower that reads interleaved media.

B batch, T_img media per row, F frames per medium, C H W pixels, v patches, d channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_cli.modeling.encoders.views import pad_views
from vlm_cli.modeling.towers import Layers, find_channels, find_image_size, patch_features

__all__ = ["VisionEncoder"]


class VisionEncoder(nn.Module):
    """Read all frames of all media with one tower.

    While all its parameters are frozen, the encoder records no graph and keeps the batch statistics that it loaded.

    Args:
        visual: the tower, from `build_tower`; its tensors keep their names, after `visual.`.
        layer: whose patches to return, counted from the end; of several layers, the channels are concatenated.
        class_token: put the class token before the patches.
        norm: apply the tower's last norm; None applies it to the last layer only.
    """

    def __init__(
        self, visual: nn.Module, layer: Layers = -1, *, class_token: bool = False, norm: bool | None = None
    ) -> None:
        super().__init__()
        self.visual = visual
        self.layer = layer
        self.class_token = class_token
        self.norm = norm

    def forward(self, vision_x: Tensor, vision_mask: Tensor | None = None, vision_grid: Tensor | None = None) -> Tensor:
        """Read all views of all media.

        Args:
            vision_x: float[B, T_img, F, C, H, W].
            vision_mask: bool[B, T_img, F]; counts only if the tower reads the views of a medium together.
            vision_grid: int[B, T_img, 4], see `VLM.encode_vision`; counts as `vision_mask` does.

        Returns:
            float[B, T_img, F, v, d].
        """
        if self.num_views is not None:
            return self._read_views(vision_x, vision_mask, vision_grid)
        pixels = vision_x.flatten(0, 2)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trainable):
            features = patch_features(self.visual, pixels, self.layer, class_token=self.class_token, norm=self.norm)
        return features.unflatten(0, vision_x.shape[:3])

    def _read_views(self, vision_x: Tensor, vision_mask: Tensor | None, vision_grid: Tensor | None) -> Tensor:
        assert self.num_views is not None
        views, mask = pad_views(vision_x, vision_mask, self.num_views)
        visual: Any = self.visual
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trainable):
            features = visual.view_features(
                views.flatten(0, 1), mask.flatten(0, 1), None if vision_grid is None else vision_grid.flatten(0, 1)
            )
        features = features.unflatten(0, vision_x.shape[:2])[:, :, : vision_x.shape[2]]
        return features if self.class_token else features[..., 1:, :]

    @property
    def num_views(self) -> int | None:
        """The views that the tower reads of each medium, padding included; None if it reads each view by itself."""
        return getattr(self.visual, "num_views", None)

    @property
    def image_size(self) -> tuple[int, int]:
        """The (H, W) pixels that the tower reads."""
        return find_image_size(self.visual)

    @property
    def num_channels(self) -> int:
        """The C of the pixels: 3, and 3 for each of several encoders."""
        return find_channels(self.visual)

    @property
    def is_trainable(self) -> bool:
        """Whether any parameter of the tower trains."""
        return any(p.requires_grad for p in self.visual.parameters())

    def train(self, mode: bool = True) -> VisionEncoder:
        """Switch to training mode, unless the tower is frozen."""
        return super().train(mode and self.is_trainable)
