"""How a vision model of Transformers prepares images, in the words of `vlm_cli.preprocessing`.

{"height", "width"}                    both sides to these pixels
{"height", "width"}, do_center_crop    both sides to these pixels, then the middle (DeiT)
{"shortest_edge"}, do_center_crop      the shorter side to these pixels, then the middle (CLIP, DINOv2)
{"shortest_edge"}, crop_pct            the shorter side to the pixels over crop_pct, then the middle (ConvNeXt)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

__all__ = ["Pixels", "read_pixels"]

#: PIL's number of a resampling filter -> OpenCLIP's word.
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
#: ImageNet's, for a model that publishes no image processor.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Names of settings of image processors that make other views of an image, or pad it. `vlm` leaves these steps out.
_OTHER_VIEWS = (
    *("do_image_splitting", "crop_to_patches", "split_image", "image_grid_pinpoints", "max_image_tiles", "slice_mode"),
    *("do_pad", "pad_size", "size_divisor", "max_patches", "max_num_patches", "do_thumbnail", "do_crop_margin"),
    *("do_flip_channel_order", "rescale_offset", "do_grayscale", "do_color_quantize", "keep_aspect_ratio"),
    *("merge_size", "patch_size", "max_slice_nums", "min_size", "do_affine_transform"),
)


@dataclass(frozen=True)
class Pixels:
    """How images are prepared.

    Attributes:
        size: (H, W) pixels that the model then reads; None if the processor does not say.
        resize_mode: `shortest` or `squash`.
        edge: pixels of the shorter side before the crop.
        squashed: (H, W) pixels before the crop.
        mean, std, interpolation: in OpenCLIP's words.
        skipped: settings that `vlm` does not follow.
    """

    size: tuple[int, int] | None = None
    resize_mode: str = "squash"
    edge: int | None = None
    squashed: tuple[int, int] | None = None
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    interpolation: str = "bicubic"
    skipped: tuple[str, ...] = ()

    def settings(self, size: tuple[int, int]) -> dict[str, Any]:
        """Return the settings of `Preprocessing` for images of (H, W) pixels; what is cut off stays the same part."""
        from vlm_cli.preprocessing import CROP_DOWN  # imports torch

        own = self.size or size
        found: dict[str, Any] = {
            "size": size[0] if size[0] == size[1] else [*size],
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
        }
        if self.resize_mode == "shortest":
            edge = int((self.edge or own[0]) * size[0] / own[0])
            return found | CROP_DOWN | ({"shortest_edge": edge} if edge != size[0] else {})
        if self.squashed not in (None, own):
            assert self.squashed is not None
            sides = [int(before * new / old) for before, new, old in zip(self.squashed, size, own, strict=True)]
            return found | CROP_DOWN | {"squashed": sides}
        return found


def read_pixels(data: Mapping[str, Any] | None, kind: str = "") -> Pixels:
    """Read the settings of an image processor of Transformers.

    Args:
        data: the settings, with the defaults of its class; None if the model publishes none.
        kind: name of the class; two of them compute the shorter side in their own ways.
    """
    if data is None:
        return Pixels()
    skipped = [key for key in _OTHER_VIEWS if data.get(key) not in (None, False, 0, [], {}) and not _is_idle(key, data)]
    colours = _read_colours(data)
    size = data.get("size") if isinstance(data.get("size"), Mapping) else None
    if size is None or data.get("do_resize") is False:
        return Pixels(**colours, skipped=(*skipped, *(["size"] if size is not None else [])))
    sides = {key: value for key, value in size.items() if value is not None}
    crop = _sides(data.get("crop_size")) if data.get("do_center_crop") else None
    if sides.keys() == {"height", "width"}:
        resized = (sides["height"], sides["width"])
        return Pixels(size=crop or resized, squashed=resized if crop else None, **colours, skipped=tuple(skipped))
    if sides.keys() == {"shortest_edge"}:
        edge = sides["shortest_edge"]
        if data.get("crop_pct"):
            crop = crop or (edge, edge)
            squash = kind.startswith("ConvNext") and edge >= 384
            edge = edge if squash else int(edge / data["crop_pct"])
            mode = "squash" if squash else "shortest"
            return Pixels(size=crop, resize_mode=mode, edge=edge, **colours, skipped=tuple(skipped))
        if kind.startswith("Levit"):
            edge = int(256 / 224 * edge)
        if crop is not None and crop[0] == crop[1]:
            return Pixels(size=crop, resize_mode="shortest", edge=edge, **colours, skipped=tuple(skipped))
    return Pixels(**colours, skipped=(*skipped, "size"))


def _is_idle(key: str, data: Mapping[str, Any]) -> bool:
    """Say whether a setting has no effect on an image that is resized to both sides."""
    size = data.get("size")
    is_whole = isinstance(size, Mapping) and {key for key, x in size.items() if x is not None} == {"height", "width"}
    return key == "patch_size" and is_whole


def _read_colours(data: Mapping[str, Any]) -> dict[str, Any]:
    """Read how numbers are made of colours."""
    mean, std = _three(data.get("image_mean", 0.0)), _three(data.get("image_std", 1.0))
    if data.get("do_normalize") is False or data.get("image_mean") is None:
        mean, std = (0.0,) * 3, (1.0,) * 3
    elif data.get("include_top") and data.get("do_normalize") is not False and "rescale_offset" in data:
        std = tuple(x * x for x in std)  # EfficientNet divides twice
    factor = data.get("rescale_factor", 1 / 255) if data.get("do_rescale", True) else 1.0
    if not isclose(factor, 1 / 255, rel_tol=1e-4):
        mean, std = tuple(x / (255 * factor) for x in mean), tuple(x / (255 * factor) for x in std)
    resample = data.get("resample")
    interpolation = _INTERPOLATIONS.get(3 if resample is None else int(resample), "bicubic")
    return {"mean": mean, "std": std, "interpolation": interpolation}


def _three(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, (list, tuple)) else (float(value or 0),) * 3


def _sides(size: Any) -> tuple[int, int] | None:
    """Return (H, W) of a size; None if it has none."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        return (edge, edge) if edge else (size["height"], size["width"]) if size.get("height") else None
    return (size, size) if isinstance(size, int) else None
