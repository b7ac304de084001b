"""How an image becomes the pixels that a vision encoder reads, and what of the image the encoder does not see.

The arithmetic is that of OpenCLIP's `image_transform`, bit for bit; a test compares the two. Three ways to resize:

    shortest   the shorter side to the encoder's size, then the middle      1 → ┌──[####]──┐
    longest    the longer side to the encoder's size, then bars around it   2 → [  ┌──┐    ]
    squash     both sides to the encoder's size                             3 → [##########]

C H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_cli.media.decode import is_opaque, on_white
from vlm_cli.tiling import Views, cut
from vlm_cli.tiling.check import check_one_size

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CROP_DOWN", "Placement", "Preprocessing", "SeveralPreprocessing", "make_preprocessing", "three"]

#: The setting that makes an odd margin start at the lower of its two middles, as Transformers' image processors do.
CROP_DOWN = {"crop": "down"}

#: Settings that OpenCLIP does not have.
_OWN = ("crop", "shortest_edge", "squashed", "least_side")

MAX_RESIZED = 2**25  # pixels of a resized image; of a larger one, only the part that the encoder sees is made


@dataclass(frozen=True)
class Placement:
    """Where an image lies in what the vision encoder sees; all sizes are (width, height) in pixels.

    Attributes:
        image: size of the image.
        resized: size to which it is resized.
        seen: size of what the encoder sees.
        start: (left, top) of what the encoder sees, in the resized image; negative where a bar stands.
    """

    image: tuple[int, int]
    resized: tuple[int, int]
    seen: tuple[int, int]
    start: tuple[int, int]

    @property
    def unseen(self) -> float:
        """The fraction of the image that the encoder does not see."""
        shown = [min(whole, part) / whole for whole, part in zip(self.resized, self.seen, strict=True)]
        return 1 - shown[0] * shown[1]

    def describe(self) -> str:
        """Say in words what becomes of the image: `8000x6000 → 224x224, centre crop, 25 % unseen`."""
        (width, height), (to_width, to_height) = self.image, self.seen
        words = [f"{width}x{height} → {to_width}x{to_height}"]
        if self.unseen:
            percent = "over 99" if self.unseen > 0.99 else max(1, round(100 * self.unseen))
            words += ["centre crop", f"{percent} % unseen"]
        elif self.start != (0, 0) or self.resized != self.seen:
            words += ["with bars"]
        elif width * to_height != height * to_width:
            words += ["squashed"]
        return ", ".join(words)


class Preprocessing:
    """Turn images into the pixels that a vision encoder reads.

    Args:
        settings: OpenCLIP's `PreprocessCfg` as a dictionary: `size` in pixels (one side, or height and width), `mean`,
            `std`, `interpolation`, `resize_mode` and `fill_color`; `crop`, which is `round` or `down`;
            `shortest_edge`, the pixels of the shorter side before the middle is cut out of it, if not those of `size`;
            `squashed`, (height, width) to which an image is squashed before that, if not `size`; and `least_side`,
            which makes `longest` that of DeepSeek-VL: no side of a resized image has fewer pixels than these.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from open_clip.transform import PreprocessCfg

        own = {key: x for key, x in settings.items() if key not in _OWN}
        self.config = config = PreprocessCfg(**own)
        size = config.size if isinstance(config.size, (tuple, list)) else (config.size, config.size)
        self.height, self.width = size
        self.edge: int = settings.get("shortest_edge", min(size))
        self.squashed: tuple[int, int] = tuple(settings.get("squashed", size))
        self.least_side: int | None = settings.get("least_side")
        self.crops_down = settings.get("crop") == CROP_DOWN["crop"]

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """The (width, height) in pixels that each encoder reads: here, of the only one."""
        return [(self.width, self.height)]

    def place(self, width: int, height: int) -> Placement:
        """Say where an image of this size goes."""
        resized, seen = self._resize(width, height), (self.width, self.height)
        left, top = (self._start(whole, part) for whole, part in zip(resized, seen, strict=True))
        return Placement((width, height), resized, seen, (left, top))

    def _start(self, whole: int, part: int) -> int:
        """Return where the middle part begins; a bar before the image is never longer than the one behind it."""
        if whole < part:
            return -((part - whole) // 2)
        return (whole - part) // 2 if self.crops_down else round((whole - part) / 2)

    def describe(self) -> str:
        """Say in words what happens to every image: `shorter side to 224 pixels, centre crop 224x224`."""
        seen = f"{self.width}x{self.height}"
        if self.config.resize_mode == "squash":
            height, width = self.squashed
            crop = "" if (height, width) == (self.height, self.width) else f", centre crop {seen}"
            return f"squashed to {width}x{height}{crop}"
        if self.config.resize_mode == "longest":
            return f"longer side to {max(self.width, self.height)} pixels, with bars to {seen}"
        return f"shorter side to {self.edge} pixels, centre crop {seen}"

    def __call__(self, image: Image) -> Tensor:
        """Turn one image into float[C, H, W].

        As in OpenCLIP, an image that is not RGB is resized as it is, and converted then.
        """
        from torchvision.transforms.functional import to_tensor

        return self._normalize(to_tensor(self.cut(image if is_opaque(image) else on_white(image))))

    def _normalize(self, pixels: Tensor) -> Tensor:
        from torchvision.transforms.functional import normalize

        return normalize(pixels, three(self.config.mean), three(self.config.std))

    def cut_into_views(self, image: Image, views: Views) -> Tensor:
        """Turn one picture into its views, float[F, C, H, W]."""
        from torchvision.transforms.functional import resize, to_tensor

        if not views.steps:
            return self(image)[None]
        found = cut((image if is_opaque(image) else on_white(image)).convert("RGB"), views, self.filter)
        pixels = [to_tensor(tile) for tile in found.tiles]
        if found.thumbnail is not None:
            whole = to_tensor(found.thumbnail)
            if views.thumbnail_of == "exact canvas":  # nanoVLM resizes numbers, and not 8-bit pixels
                whole = resize(to_tensor(found.canvas), [self.height, self.width], antialias=True)
            pixels = [whole, *pixels] if views.thumbnail == "first" else [*pixels, whole]
        return torch.stack([self._normalize(x) for x in pixels])

    def cut(self, image: Image) -> Image:
        """Resize an image, and cut out what the encoder sees, as RGB."""
        from PIL import Image as PIL

        placement = self.place(*image.size)
        (width, height), (left, top) = placement.resized, placement.start
        right, bottom = left + self.width, top + self.height
        if width * height > MAX_RESIZED:
            image, (left, top) = self._resize_seen(image, placement)
            width, height = image.size
            right, bottom = left + self.width, top + self.height
        elif image.size != placement.resized:
            image = image.resize(placement.resized, self.filter)
        image = image.convert("RGB")
        if (left, top, right, bottom) == (0, 0, width, height):
            return image
        fill = self.config.fill_color
        ground = PIL.new("RGB", placement.seen, (fill, fill, fill) if isinstance(fill, int) else tuple(fill))
        ground.paste(image, (-left, -top))
        return ground

    def _resize_seen(self, image: Image, placement: Placement) -> tuple[Image, tuple[int, int]]:
        """Make the part of the resized image that the encoder sees, and say where what it sees begins in that part.

        The part has a margin: Pillow's filters read up to 3 pixels to each side, of the smaller of the two images,
        and nothing outside of the box that they are given. Rows first, then columns, as Pillow resizes a whole image;
        given a box, it may begin with the columns, and rounds other numbers.
        """
        sides: list[tuple[int, int, float]] = []  # from, to in the resized image; pixels of `image` for each
        for size, resized, seen, start in zip(
            placement.image, placement.resized, placement.seen, placement.start, strict=True
        ):
            step = size / resized
            margin = math.ceil(3 * max(1.0, 1 / step)) + 1
            sides.append((max(0, start - margin), min(resized, start + seen + margin), step))
        (left, right, x), (top, bottom, y) = sides
        first, last = math.floor(top * y), min(math.ceil(bottom * y), image.height)
        rows = image.resize(
            (right - left, last - first), self.filter, (left * x, first, min(right * x, image.width), last)
        )
        box = 0, top * y - first, rows.width, min(bottom * y, image.height) - first
        return rows.resize((rows.width, bottom - top), self.filter, box), (
            placement.start[0] - left,
            placement.start[1] - top,
        )

    def _resize(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) to which an image is resized; no side is shorter than 1 pixel."""
        mode = self.config.resize_mode or "shortest"
        if mode == "squash":
            return self.squashed[1], self.squashed[0]
        if mode == "shortest" and self.width == self.height:
            short, long = sorted((width, height))
            other = int(self.edge * long / short)
            return (self.edge, other) if width <= height else (other, self.edge)
        if mode == "longest" and self.least_side is not None:
            # The same sizes as below but for the last bit, which can decide how a half is rounded.
            factor, least = min(self.width, self.height) / max(width, height), self.least_side
            return max(least, round(width * factor)), max(least, round(height * factor))
        across, down = width / self.width, height / self.height
        ratio = max(across, down) if mode == "longest" else min(across, down)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    @property
    def filter(self) -> Any:
        """Pillow's filter for resizing."""
        from PIL.Image import Resampling

        # OpenCLIP takes bicubic for `random`, and where it fits the shorter side of a picture to a rectangle.
        fits_rectangle = self.config.resize_mode == "shortest" and self.width != self.height
        word = "bicubic" if self.config.interpolation == "random" or fits_rectangle else self.config.interpolation
        return Resampling[(word or "bicubic").upper()]


class SeveralPreprocessing(Preprocessing):
    """Turn images into the pixels that several vision encoders read, each with its own size and normalisation.

    The pixels of encoder i stand in channels 3·i to 3·i + 2, at the top left if other encoders read larger images.

    Args:
        settings: `encoders`, the settings of each, and `size`, the (height, width) that holds all of them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.each = [Preprocessing(x) for x in settings["encoders"]]
        super().__init__(settings["encoders"][0])
        self.whole: tuple[int, int] = tuple(settings["size"])

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """The (width, height) in pixels that each encoder reads."""
        return [(x.width, x.height) for x in self.each]

    def describe(self) -> str:
        """Say in words what happens to every image, for each encoder."""
        return "; ".join(dict.fromkeys(x.describe() for x in self.each))

    def __call__(self, image: Image) -> Tensor:
        """Turn one image into float[3·k, H, W]."""
        pixels = torch.zeros(3 * len(self.each), *self.whole)
        for i, own in enumerate(self.each):
            pixels[3 * i : 3 * i + 3, : own.height, : own.width] = own(image)
        return pixels

    def cut_into_views(self, image: Image, views: Views) -> Tensor:
        """Turn one picture into its views, float[F, 3·k, H, W].

        Raises:
            CompositionError: if the encoders read tiles of different sizes.
        """
        if not views.steps:
            return self(image)[None]
        check_one_size(self.tiles)
        return torch.cat([x.cut_into_views(image, views) for x in self.each], dim=1)


def make_preprocessing(settings: Mapping[str, Any]) -> Preprocessing:
    """Make what turns images into pixels, for one encoder or several."""
    return SeveralPreprocessing(settings) if "encoders" in settings else Preprocessing(settings)


def three(values: Any) -> list[float]:
    """Return one number for each channel, of which there may be a single one for all."""
    return list(values) if isinstance(values, (tuple, list)) else [values] * 3
