"""`OpenCLIPImageProcessor`: pictures and clips to the pixels of their views.

B rows, T_img media per row, F frames per medium, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature

from vlm_cli.composition import UNTILED, Choice, limit_tiles, read_tiling
from vlm_cli.errors import CompositionError
from vlm_cli.media import LoadedClip, LoadedImage
from vlm_cli.modeling.batching import MediumPixels, stack_media
from vlm_cli.preprocessing import CROP_DOWN, Placement, Preprocessing, make_preprocessing
from vlm_cli.printable import count_of
from vlm_cli.tiling import MediumSize, Views, check_tiling, plan
from vlm_cli.tiling.texts import list_texts

__all__ = ["Frames", "OpenCLIPImageProcessor"]

Frames = Sequence[Image]  # of one medium


class OpenCLIPImageProcessor(BaseImageProcessor):
    """Preprocess images as in the training of an OpenCLIP tower, and cut pictures into views.

    Args:
        preprocess: settings of `Preprocessing`: size in pixels, mean, std, interpolation, resize mode, crop.
        tiling: the section `tiling` of the composition, as plain data; None for `none`.

    Raises:
        CompositionError: if the tiling is not valid.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self, preprocess: dict[str, Any] | None = None, tiling: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.preprocess_config = preprocess or {}
        self._tiling = read_tiling(tiling)

    def to_dict(self) -> dict[str, Any]:
        """Return what `preprocessor_config.json` holds."""
        data = super().to_dict()
        data["preprocess"] = data.pop("preprocess_config")
        data.pop("_transform", None)
        data.pop("_clip_transform", None)
        data.pop("_tiling", None)
        if self._tiling != UNTILED:
            data["tiling"] = self._tiling.to_dict()
        return data

    @property
    def tiling(self) -> Choice:
        """How pictures are cut into views."""
        return self._tiling

    @property
    def cuts(self) -> bool:
        """Whether a picture may become several views."""
        return self._tiling.type != "none"

    def describe(self) -> str:
        """Say in words what happens to every image."""
        if not self.cuts:
            return self.preprocessing.describe()
        options, (width, height) = self._tiling.options, self.tile
        most = getattr(options, "max_tiles", None)
        number = "tiles" if most is None else f"at most {count_of(most, 'tile')}"
        whole = "" if options.thumbnail == "none" else ", and the whole image"
        return f"cut into {number} of {width}x{height} pixels{whole}"

    def describe_image(self, width: int, height: int, *, cuts: bool = True) -> str | None:
        """Say in words what becomes of an image of this size; None if the vision encoder sees it as it is.

        Args:
            width: pixels.
            height: pixels.
            cuts: whether the image may be cut into views; a frame of a clip may not.
        """
        if self.cuts and cuts:
            return self.plan(width, height).describe()
        placement = (self.preprocessing if cuts else self.clip_preprocessing).place(width, height)
        return None if placement.image == placement.seen else placement.describe()

    def limit_tiles(self, max_tiles: int) -> None:
        """Cut each picture into at most so many tiles from now on.

        Raises:
            CompositionError: if pictures are not cut into tiles, or the model knows no text for so many.
        """
        limited = Choice(type=self._tiling.type, options=limit_tiles(self._tiling.options, max_tiles))
        check_tiling(limited, *self.preprocessing.tiles)
        known = list_texts(self._tiling, self.tile)
        if new := [text for text in list_texts(limited, self.tile) if text not in known]:
            raise CompositionError(
                f"--max-tiles is {max_tiles}, but the model knows the texts of at most "
                f"{self._tiling.options.max_tiles} tiles: {new[0]!r} is not among them. Give no more than those."
            )
        self._tiling = limited

    @property
    def tile(self) -> tuple[int, int]:
        """The size of a view, (width, height) in pixels."""
        return self.frame_shape[2], self.frame_shape[1]

    def plan(self, width: int, height: int) -> Views:
        """Say how a picture of this size is cut.

        Raises:
            MediaError: if the picture is too thin.
        """
        return plan(self._tiling, self.tile, width, height)

    def measure(self, width: int, height: int) -> MediumSize:
        """Say how many views a picture of this size has, and in which rows and columns its tiles stand.

        Raises:
            MediaError: if the picture is too thin.
        """
        return self.plan(width, height).size if self.cuts else MediumSize()

    def cut(self, image: Image, width: int | None = None, height: int | None = None) -> Tensor:
        """Turn one picture into its views, float[F, C, H, W].

        Args:
            image: the picture.
            width: pixels of the picture's file, if it was read at a smaller size; None for those of `image`.
            height: the same.

        Raises:
            MediaError: if the picture is too thin.
        """
        if not self.cuts:
            return self.transform(image)[None]
        return self.preprocessing.cut_into_views(image, self.plan(width or image.width, height or image.height))

    def read(self, medium: LoadedImage | LoadedClip) -> MediumPixels:
        """Turn a picture or a clip into its views. The frames of a clip are one view each.

        Raises:
            MediaError: if a picture is too thin to be cut.
        """
        if isinstance(medium, LoadedClip):
            views = self.read_frames(medium.frames)
            return MediumPixels(views, MediumSize(len(views)))
        size = self.measure(medium.width, medium.height)
        return MediumPixels(self.cut(medium.image, medium.width, medium.height), size)

    def read_frames(self, frames: Frames) -> Tensor:
        """Turn the frames of a clip into float[F, C, H, W]."""
        return torch.stack([self.clip_preprocessing(frame) for frame in frames])

    def transform(self, image: Image) -> Tensor:
        """Turn one frame into float[C, H, W]."""
        return self.preprocessing(image)

    def place(self, width: int, height: int) -> Placement:
        """Say what of an image of this size the vision encoder sees."""
        return self.preprocessing.place(width, height)

    @property
    def preprocessing(self) -> Preprocessing:
        """What the settings say, as a function."""
        if not hasattr(self, "_transform"):
            self._transform = make_preprocessing(self.preprocess_config)
        return self._transform

    @property
    def clip_preprocessing(self) -> Preprocessing:
        """What happens to the frames of a clip: as to a picture that is not cut, unless the tiling crops them."""
        if not getattr(self._tiling.options, "clip_crop", False):
            return self.preprocessing
        if not hasattr(self, "_clip_transform"):
            cropping = {"resize_mode": "shortest"} | CROP_DOWN
            self._clip_transform = Preprocessing({**self.preprocess_config, **cropping})
        return self._clip_transform

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """The (C, H, W) of a preprocessed frame."""
        size = self.preprocess_config.get("size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return 3 * len(self.preprocess_config.get("encoders", "1")), height, width

    def preprocess(self, images: Sequence[Sequence[Frames]], **kwargs: Any) -> BatchFeature:
        """Turn rows of media into one tensor.

        Args:
            images: for each row its media, for each medium its frames. A medium of one frame is a picture, which may be
                cut into views; the frames of a clip are one view each.
            kwargs: ignored.

        Returns:
            `pixel_values` float[B, T_img, F, C, H, W], zero at padding, and `vision_mask` bool[B, T_img, F], false at
            padding. If pictures are cut, also `vision_grid` int[B, T_img, 4]: rows and columns of tiles, and the
            picture's height and width in pixels; zeros for a medium that is not cut.

        Raises:
            MediaError: if a picture is too thin to be cut.
        """
        media = [[self._views(medium) for medium in row] for row in images]
        pixels, mask = stack_media(media, shape=self.frame_shape)
        if not self.cuts:
            return BatchFeature({"pixel_values": pixels, "vision_mask": mask})
        grid = torch.zeros(*mask.shape[:2], 4, dtype=torch.long)
        for b, row in enumerate(images):
            for t, medium in enumerate(row):
                if len(medium) == 1:
                    grid[b, t] = torch.tensor(self.measure(*medium[0].size).grid)
        return BatchFeature({"pixel_values": pixels, "vision_mask": mask, "vision_grid": grid})

    def _views(self, frames: Frames) -> Tensor:
        """Return the views of a medium, float[F, C, H, W]."""
        if len(frames) == 1:
            return self.cut(frames[0])
        return self.read_frames(frames)

    __call__ = preprocess  # type: ignore[assignment]  # images with several frames
