"""Vision models of Transformers that read all views of a picture together: Mllama's (Llama 3.2 Vision).

N media, F views per medium, C H W pixels, v patches of a view with its class token, d channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vlm_cli.errors import VisionEncoderError

__all__ = ["ReadsViews", "pad_views"]


class ReadsViews:
    """What vlm adds to Mllama's vision model: the features of each patch of each view.

    The class of an encoder has the model's class as its other base, so that tensors keep their published names. The
    model reads `num_views` tiles of each medium. It has learned embeddings for each place in each grid of tiles, and
    its patches attend to those of padding too, so that it must see the padding.
    """

    vision_config: Mapping[str, Any]
    config: Any
    image_size: int  # pixels of a view; the model sets it
    has_feature_settings = True  # patch_features takes class_token and norm

    @property
    def num_views(self) -> int:
        """F, the views of each medium, padding included."""
        found: int = self.config.max_num_tiles
        return found

    def patch_features(
        self, pixels: Tensor, layer: int = -1, *, class_token: bool = False, norm: bool | None = None
    ) -> Tensor:
        """Read each image as a medium of one view; see `vlm_cli.modeling.towers.patch_features`."""
        if layer != -1 or norm is not None:
            raise VisionEncoderError(
                "the vision encoder puts the channels of several layers together; leave out layer and norm."
            )
        views, mask = pad_views(pixels[:, None], None, self.num_views)
        features = self.view_features(views, mask)[:, 0]
        return features if class_token else features[:, 1:]

    def view_features(self, views: Tensor, mask: Tensor, grid: Tensor | None = None) -> Tensor:
        """Return the features of all patches, the class token of each view first.

        Args:
            views: float[N, F, C, H, W], zero at padding.
            mask: bool[N, F], true for views that are not padding.
            grid: int[N, 4], the rows and columns of tiles first; 0 rows for a medium without tiles, whose views are
                read as one row. None for such media only.

        Returns:
            float[N, F, v, d].

        Raises:
            ValueError: for a grid that the model has no embeddings for.
        """
        model: Any = self
        found = model(
            pixel_values=views[:, None],
            aspect_ratio_ids=self._number_grids(mask, grid)[:, None],
            aspect_ratio_mask=mask[:, None].long(),
        )
        features: Tensor = found.last_hidden_state[:, 0]
        return features

    def _number_grids(self, mask: Tensor, grid: Tensor | None) -> Tensor:
        """Return the number of each medium's grid among those that the model knows, from 1: int[N]."""
        known = torch.tensor(self.config.supported_aspect_ratios, device=mask.device)  # [grids, 2]
        count = mask.sum(-1).clamp(min=1)
        shape = torch.stack([torch.ones_like(count), count], dim=-1)  # [N, 2]
        if grid is not None:
            shape = torch.where(grid[:, :1] > 0, grid[:, :2], shape)
        equal = (known[None] == shape[:, None]).all(-1)  # [N, grids]
        if not (mask.is_meta or torch.compiler.is_compiling()) and not equal.any(-1).all():
            rows, columns = shape[~equal.any(-1)][0].tolist()
            names = ", ".join(f"{r} x {c}" for r, c in known.tolist())
            raise ValueError(
                f"the vision encoder has no embeddings for {rows} x {columns} tiles. It knows {names} (rows x columns)."
            )
        return equal.int().argmax(-1) + 1


def pad_views(views: Tensor, mask: Tensor | None, num_views: int) -> tuple[Tensor, Tensor]:
    """Pad media with zeros to so many views.

    Args:
        views: float[*, F, C, H, W].
        mask: bool[*, F], true for views that are not padding; None for all.
        num_views: F of the result.

    Raises:
        ValueError: if there are more views.
    """
    if mask is None:
        mask = torch.ones(views.shape[:-3], dtype=torch.bool, device=views.device)
    missing = num_views - views.shape[-4]
    if missing < 0:
        raise ValueError(
            f"a medium has {views.shape[-4]} views, and the vision encoder reads at most {num_views} together. Cut "
            f"pictures into fewer tiles (--max-tiles {num_views}), or show fewer frames."
        )
    return nnf.pad(views, (0, 0, 0, 0, 0, 0, 0, missing)), nnf.pad(mask, (0, missing))
