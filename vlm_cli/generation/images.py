"""Images of many rows: decoded ahead of the model, in processes of their own, and kept for rows that show them again.

    rows ──► sources not seen lately ──► workers: decode, preprocess ──► pixels
      │                                                                     │ model: once for equal pixels
      └──► handles ◄────────────────────────────────────────────────── vision tokens

C H W pixels, n vision tokens of d channels.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm_cli.errors import MediaError, first_line
from vlm_cli.generation.encoded_image import EncodedImage, ImageSlot
from vlm_cli.generation.rows import Row
from vlm_cli.interrupt import ignore_interrupt
from vlm_cli.media import MediaLoader

__all__ = ["ImageCache", "Preprocessor", "with_images"]

PREFETCH_ROWS = 16  # rows whose images each worker prepares before they are asked for


class ImageCache:
    """Images that were shown lately, by source; equal pixels are one image.

    An image that leaves lives on in the rows that still wait for it.

    Args:
        capacity: sources that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._recent: OrderedDict[bytes, ImageSlot] = OrderedDict()
        self._images: WeakValueDictionary[bytes, EncodedImage] = WeakValueDictionary()

    def find(self, source: str) -> tuple[ImageSlot, bool]:
        """The slot of a source, and whether it is new: its image has then to be made."""
        key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest()  # a data: URI is long
        known = self._recent.pop(key, None)
        slot = self._recent[key] = known or ImageSlot()
        if len(self._recent) > self.capacity:
            self._recent.popitem(last=False)
        return slot, known is None

    def fill(self, slot: ImageSlot, found: np.ndarray | str) -> None:
        """Put in pixels, float[C, H, W], or a message."""
        if isinstance(found, str):
            slot.error = found
            return
        digest = hashlib.sha256(found.data).digest()
        image = self._images.get(digest)
        if image is None:
            image = self._images[digest] = EncodedImage(torch.from_numpy(found))
        slot.image = image


@dataclass
class Preprocessor(Dataset):
    """What worker processes hold: no model, but where images are and how its tower wants them.

    Args:
        transform: an image to float[C, H, W].
        loader: finds images.
    """

    transform: Callable[[Any], Tensor]
    loader: MediaLoader

    def __getitem__(self, sources: Sequence[str]) -> list[np.ndarray | str]:
        """Pixels of each source, or why there are none: what workers raise reaches the user as their traceback.

        No tensors, whose way between processes takes a file descriptor each.
        """
        return [self._load(source) for source in sources]

    def _load(self, source: str) -> np.ndarray | str:
        try:
            return np.ascontiguousarray(self.transform(self.loader.load(source).image).numpy())
        except MediaError as error:
            return str(error)
        except Exception as error:
            return f"the image {source[:80]!r} cannot be preprocessed: {type(error).__name__}: {first_line(error)}."


def with_images(rows: Iterator[Row], cache: ImageCache, preprocessor: Preprocessor, workers: int) -> Iterator[Row]:
    """Rows in their order, with their images; a row with a bad image has an `error`.

    Args:
        rows: are read ahead while the model is at work.
        cache: images that are there already.
        preprocessor: makes the others.
        workers: processes; 0 for none.
    """
    under_way: deque[tuple[Row, list[ImageSlot]]] = deque()

    def ask() -> Iterator[list[str]]:
        for row in rows:
            missing: list[tuple[str, ImageSlot]] = []
            for source in row.sources if row.error is None else ():
                slot, is_new = cache.find(source)
                row.images.append(slot)
                missing += [(source, slot)] if is_new else []
            under_way.append((row, [slot for _, slot in missing]))
            yield [source for source, _ in missing]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
        loader: Any = DataLoader(
            preprocessor,
            batch_size=None,
            sampler=ask(),
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=PREFETCH_ROWS if workers else None,
            worker_init_fn=ignore_interrupt if workers else None,
        )
    for found in loader:
        row, handles = under_way.popleft()
        for slot, pixels in zip(handles, found, strict=True):
            cache.fill(slot, pixels)
        if row.error is None and (errors := [x.error for x in row.images if x.error is not None]):
            row.fail(errors[0])
        yield row


def _as_it_is(found: Any) -> Any:
    return found
