"""The C-abstractor of Honeybee (https://arxiv.org/abs/2312.06742, section 3.2): convolutions around a pooling.

Of the convolutional tokenizers it serves more published models: Honeybee itself (7B and 13B), Kanana-V, HyperCLOVA X
SEED Vision, and MM1, whose paper chose it. MobileVLM's LDP serves the MobileVLM models alone.

Names and arithmetic are Honeybee's (`honeybee/projectors/projectors.py`), with timm's RegNet stages.
B batch, T_img media, F frames, v patches, n tokens, d channels.
"""

from __future__ import annotations

from functools import partial
from math import isqrt

import torch
from timm.layers.norm import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

from vlm_cli.composition import CAbstractorOptions
from vlm_cli.modeling.layers import linear_maps
from vlm_cli.modeling.vision_tokenizers.grid import Grid, whole_grid

__all__ = ["CAbstractor"]


class CAbstractor(nn.Module):
    """Mix neighbouring patches by convolutions, pool them to a square, mix again, and map each to a token.

    Args:
        options: sizes.
        dim_in: channels of the features.
        num_patches: features of one frame.
        dim_out: channels of the tokens; None keeps the channels of the convolutions.
        grid: rows and columns of patches; None for a square.

    Raises:
        CompositionError: if the features are no grid.
    """

    #: A medium's tokens depend on nothing else in its row.
    encodes_media_independently = True

    def __init__(
        self,
        options: CAbstractorOptions,
        dim_in: int,
        num_patches: int,
        dim_out: int | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.grid = whole_grid("type=c-abstractor", num_patches, grid)
        self.dim_out = options.dim if dim_out is None else dim_out
        side = isqrt(options.num_queries)
        self.token_grid: Grid = (side, side)
        stage = partial(RegStage, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        self.pos_emb = nn.Parameter(torch.empty(1, num_patches, dim_in))
        self.net = nn.Sequential(
            stage(options.depth, dim_in, options.dim),
            nn.AdaptiveAvgPool2d(side),
            stage(options.depth, options.dim, options.dim),
        )
        self.readout = linear_maps([options.dim, *[self.dim_out] * options.map_depth], "silu")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the position embeddings from N(0, 0.02), as Honeybee does."""
        nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def num_tokens(self, num_frames: int = 1) -> int:
        """Count the vision tokens of a medium of so many frames."""
        return self.token_grid[0] * self.token_grid[1] * num_frames

    def token_mask(self, frame_mask: Tensor) -> Tensor:
        """Mark the tokens of frames that are not padding: bool[B, T_img, F] -> bool[B, T_img, n]."""
        return frame_mask.repeat_interleave(self.num_tokens(), dim=-1)

    def forward(self, features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """float[B, T_img, F, v, dim_in] -> float[B, T_img, n, dim_out]; frames do not mix, so no mask is needed."""
        patches = (features + self.pos_emb).flatten(0, 2)  # [B·T_img·F, v, dim_in]
        image = patches.transpose(1, 2).unflatten(2, self.grid)
        tokens = self.readout(self.net(image).flatten(2).transpose(1, 2))  # [B·T_img·F, n of a frame, dim_out]
        return tokens.unflatten(0, features.shape[:3]).flatten(2, 3)
