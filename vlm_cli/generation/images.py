"""Decode the media of many rows ahead of the model, in worker processes, and keep them for rows that show them again.

    rows ──► sources that are new ──► workers: decode, preprocess ──► pixels
      │                                                                  │ vision encoder: once for equal pixels
      └──► slots ◄────────────────────────────────────────────────── vision tokens

F frames of a medium, C H W pixels, n vision tokens of d channels.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlm_cli.errors import MediaError, PromptError, first_line
from vlm_cli.generation.encoded_image import EncodedImage, ImageSlot
from vlm_cli.generation.rows import Row
from vlm_cli.interrupt import ignore_interrupt
from vlm_cli.media import MediaLoader
from vlm_cli.media.notes import NoteTally
from vlm_cli.media.sources import quote_source
from vlm_cli.modeling.batching import MediumPixels
from vlm_cli.prompt import Medium
from vlm_cli.tiling import MediumSize

if TYPE_CHECKING:
    from vlm_cli.image_processor import OpenCLIPImageProcessor

__all__ = ["ImageCache", "Preprocessor", "with_images"]

PREFETCH_ROWS = 16  # rows whose images each worker decodes ahead of the model

AnyRow = TypeVar("AnyRow", bound=Row)


class ImageCache:
    """The slots of the sources that rows showed last; sources with equal pixels share one image.

    A slot that the cache drops lives on in the rows that wait for it.

    Args:
        capacity: number of frames to keep; an image has one.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._recent: OrderedDict[bytes, tuple[ImageSlot, int]] = OrderedDict()
        self._frames = 0
        self._images: WeakValueDictionary[bytes, EncodedImage] = WeakValueDictionary()

    def find(self, medium: Medium, num_frames: int = 1) -> tuple[ImageSlot, bool]:
        """Return the slot of a source, and whether the slot is new, so that a worker must fill it."""
        name = f"{medium.kind}:{medium.source}".encode("utf-8", "surrogatepass")
        key = hashlib.sha256(name).digest()  # shorter than a data: URI
        known = self._recent.pop(key, None)
        slot, frames = self._recent[key] = known or (ImageSlot(), num_frames)
        self._frames += 0 if known else frames
        while self._frames > self.capacity and len(self._recent) > 1:
            self._frames -= self._recent.popitem(last=False)[1][1]
        return slot, known is None

    def fill(self, slot: ImageSlot, found: Pixels | MediaError) -> None:
        """Fill a slot with pixels, or with the reason why there are none."""
        if isinstance(found, MediaError):
            slot.error = found
            return
        medium = MediumPixels(torch.from_numpy(found.values), found.size)
        digest = medium.digest
        image = self._images.get(digest)
        if image is None:
            image = self._images[digest] = EncodedImage(medium.views, medium.size)
        slot.image = image


@dataclass(frozen=True)
class Pixels:
    """A preprocessed image or clip.

    Attributes:
        values: float[F, C, H, W].
        size: of the medium.
        notes: what became of it when it was decoded.
    """

    values: np.ndarray
    size: MediumSize
    notes: tuple[str, ...] = ()


@dataclass
class Preprocessor(Dataset[list[Pixels | MediaError]]):
    """Turns sources into pixels. Worker processes hold a copy of it, and no model.

    Args:
        images: turns images and clips into pixels, as the vision encoder wants them.
        loader: finds images and clips.
    """

    images: OpenCLIPImageProcessor
    loader: MediaLoader

    def __getitem__(self, media: Sequence[Medium]) -> list[Pixels | MediaError]:
        """Return the pixels of each medium, or the reason why there are none.

        A worker that raised would show the user its traceback. Pixels are arrays, because each tensor that a process
        sends to another takes a file descriptor.
        """
        return [self._load(medium) for medium in media]

    def _load(self, medium: Medium) -> Pixels | MediaError:
        try:
            loaded = self.loader.load_medium(medium.source, medium.kind)
            found = self.images.read(loaded)
            return Pixels(np.ascontiguousarray(found.views.numpy()), found.size, loaded.notes)
        except (MediaError, PromptError) as error:
            # A new error, because this one holds the frames that decoded the image.
            return MediaError(str(error), public=error.public)
        except Exception as error:
            words = f"the {medium.kind} {quote_source(medium.source)} cannot be preprocessed"
            return MediaError(f"{words}: {type(error).__name__}: {first_line(error)}.", public=f"{words}.")


def with_images(
    rows: Iterator[AnyRow], cache: ImageCache, preprocessor: Preprocessor, workers: int, notes: NoteTally
) -> Generator[AnyRow]:
    """Yield rows in their order, with filled slots; a row with a bad image gets an `error`.

    Args:
        rows: are read ahead while the model works.
        cache: slots of the sources that rows showed before.
        preprocessor: decodes the other sources.
        workers: processes that decode; 0 decodes in this process.
        notes: counts what becomes of the images.
    """
    pending: deque[tuple[AnyRow, list[tuple[Medium, ImageSlot]]]] = deque()

    def missing_sources() -> Iterator[list[Medium]]:
        for row in rows:
            missing: list[tuple[Medium, ImageSlot]] = []
            for medium, size in zip(row.sources, row.media, strict=True) if row.error is None else ():
                slot, is_new = cache.find(medium, size.num_frames)
                row.images.append(slot)
                missing += [(medium, slot)] if is_new else []
            pending.append((row, missing))
            yield [medium for medium, _ in missing]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # because it counts more workers than cores
        loader: Any = DataLoader(
            preprocessor,
            batch_size=None,
            sampler=missing_sources(),
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=PREFETCH_ROWS if workers else None,
            worker_init_fn=ignore_interrupt if workers else None,
        )
    for found in loader:
        row, missing_here = pending.popleft()
        for (medium, slot), pixels in zip(missing_here, found, strict=True):
            cache.fill(slot, pixels)
            if isinstance(pixels, Pixels):
                notes.add(medium.source, pixels.notes)
        if row.error is None and (errors := [x.error for x in row.images if x.error is not None]):
            row.error = errors[0]
        yield row


def _unchanged(found: list[Pixels | MediaError]) -> list[Pixels | MediaError]:
    """Return what a worker made; the DataLoader would turn it into tensors."""
    return found
