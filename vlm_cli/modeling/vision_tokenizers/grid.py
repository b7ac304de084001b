"""The grid of patches of one frame: its size, and what merges neighbours.

`v` features of a frame are class tokens, then rows·columns patches, row after row. d channels.
"""

from __future__ import annotations

from itertools import pairwise
from math import isqrt
from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from vlm_cli.errors import CompositionError

__all__ = ["Grid", "convolve", "make_convolutions", "merge_sizes", "pixel_shuffle", "pool", "whole_grid"]

Grid = tuple[int, int]  # rows, columns


def merge_sizes(setting: str, factor: int, grid: Grid, *, rounds_up: bool) -> Grid:
    """Return the rows and columns of patches after factor × factor neighbours became one.

    Args:
        setting: what merges, for the message.
        factor: of each side.
        grid: rows and columns of patches.
        rounds_up: whether squares at the edges may be incomplete.

    Raises:
        CompositionError: if they may not, and are.
    """
    rows, columns = grid
    if not rounds_up and (rows % factor or columns % factor):
        section = "tiling" if setting == "clip_pool" else "vision_tokenizer"
        remedy = "pad=true" if setting == "pixel_shuffle" else f"{setting}_by=bilinear"
        raise CompositionError(
            f"{section}.{setting}={factor} does not fit: it needs rows and columns of patches that are "
            f"multiples of {factor}, and there are {rows} x {columns}. Choose another factor or image_size, or "
            f"--set {section}.{remedy}."
        )
    return -(-rows // factor), -(-columns // factor)


def whole_grid(setting: str, num_patches: int, grid: Grid | None) -> Grid:
    """Return the grid of patches for a tokenizer that needs the neighbours of each.

    Args:
        setting: what needs the grid, for the message.
        num_patches: features of one frame.
        grid: rows and columns of patches; None for a square.

    Raises:
        CompositionError: if the features are no grid, or begin with a class token.
    """
    rows, columns = grid or (isqrt(num_patches),) * 2
    if rows * columns != num_patches:
        known = f", of which {rows} x {columns} are patches" if grid else ""
        raise CompositionError(
            f"vision_tokenizer.{setting} does not fit: it needs a grid of patches, and the vision encoder gives "
            f"{num_patches} features{known}. Leave out vision_encoder.class_token, or choose another vision encoder."
        )
    return rows, columns


def pixel_shuffle(
    features: Tensor,
    s: int,
    grid: Grid | None = None,
    order: Literal["patches", "channels"] = "patches",
) -> Tensor:
    """Make one patch of each square of s×s neighbours. Zeros at the right and at the bottom complete the last squares.

    In the order `patches`, the channels of a square's patches follow each other, row after row too: nanoVLM, Idefics3,
    SmolVLM, InternVL, Aya Vision, Cohere2 Vision, Llama 4 and LFM2-VL all do so in Transformers, whatever their
    transpositions look like. In the order `channels`, channel 0 of all patches of the square comes first (Mistral 3,
    `torch.nn.functional.unfold`). With s = 2,

        0  1  2  3
        4  5  6  7      gives   [0 1 4 5] [2 3 6 7] [8 9 12 13] [10 11 14 15]
        8  9 10 11
        12 13 14 15

    Args:
        features: float[*, v, d].
        s: divides the sides of the grid.
        grid: rows and columns; None for a square.
        order: of the channels of a new patch.

    Returns:
        float[*, v/s², s²·d], where v counts the patches of the completed grid.
    """
    rows, columns = grid or (isqrt(features.shape[-2]),) * 2
    cells = features.unflatten(-2, (rows, columns))
    if rows % s or columns % s:
        cells = nn.functional.pad(cells, (0, 0, 0, -columns % s, 0, -rows % s))
    to = "... (h w) (a b d)" if order == "patches" else "... (h w) (d a b)"
    return rearrange(cells, f"... (h a) (w b) d -> {to}", a=s, b=s)


def pool(features: Tensor, p: int, grid: Grid, by: Literal["average", "bilinear"] = "average") -> Tensor:
    """Make one patch of p×p neighbours: their average, or a bilinear interpolation with rounded-up sides.

    Gemma 3 averages. LLaVA-OneVision interpolates the frames of a clip, and 27 patches per side become 14.

    Args:
        features: float[*, v, d].
        p: divides the sides of the grid.
        grid: rows and columns.
        by: the way.

    Returns:
        float[*, rows of the pooled grid · its columns, d].
    """
    rows, columns = grid
    image = features.flatten(0, -3).transpose(1, 2).unflatten(2, grid)  # [N, d, rows, columns]
    if by == "average":
        image = nn.functional.avg_pool2d(image, p)
    else:
        image = nn.functional.interpolate(image, size=(-(-rows // p), -(-columns // p)), mode="bilinear")
    return image.flatten(2).transpose(1, 2).unflatten(0, features.shape[:-2])


def make_convolutions(count: int, dim_in: int, dim_out: int) -> nn.Sequential:
    """Make convolutions of 3×3 patches, each of which halves rows and columns, as the two of GOT-OCR 2.0 do.

    Each doubles the channels, and the last gives `dim_out`. Nothing is between them, and they have no biases.
    """
    dims = [*(dim_in << i for i in range(count)), dim_out]
    return nn.Sequential(*(nn.Conv2d(a, b, kernel_size=3, stride=2, padding=1, bias=False) for a, b in pairwise(dims)))


def convolve(features: Tensor, convolutions: nn.Sequential, grid: Grid) -> Tensor:
    """Apply `convolutions` to the patches of frames: float[*, v, d] -> float[*, v', dim_out].

    Args:
        features: of patches.
        convolutions: each halves the sides of the grid, rounded up.
        grid: rows and columns.
    """
    image = features.flatten(0, -3).transpose(1, 2).unflatten(2, grid)  # [N, d, rows, columns]
    return convolutions(image).flatten(2).transpose(1, 2).unflatten(0, features.shape[:-2])
