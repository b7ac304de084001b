"""From a row of a stream to tokens and pixels. Worker processes do this; the order of the rows is made elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm_cli.data.media_check import MediaCheck
from vlm_cli.data.records import Reading, Record, read_record
from vlm_cli.data.sources import Embedded, Row, Source
from vlm_cli.data.stream import Drawn
from vlm_cli.errors import VLMError
from vlm_cli.interrupt import ignore_interrupt
from vlm_cli.media import MediaLoader, short_name
from vlm_cli.modeling.batching import MediumPixels
from vlm_cli.training.preparing import LearnedSequence, RecordPreparer

__all__ = ["PreparedRow", "RowReader", "begin_worker"]


@dataclass(frozen=True)
class PreparedRow:
    """What the model learns of a row.

    Attributes:
        number: of the row in the stream.
        name: of the record, for messages.
        problem: why the row cannot be used; None if it can.
        is_left_out: the user wants rows with this problem to be left out.
        sequences: what is learned at a time. Each shows the first of the row's media.
        media: the row's images and clips; None while `pixels` holds them.
        pixels: all media as one tensor, which travels between processes as one file.
        shapes: of each medium in `pixels`.
        notes: what became of images when they were decoded: source and notes.
    """

    number: int
    name: str
    problem: str | None = None
    is_left_out: bool = False
    sequences: Sequence[LearnedSequence] = ()
    media: Sequence[MediumPixels] = ()
    pixels: Tensor | None = None
    notes: Sequence[tuple[str, tuple[str, ...]]] = ()

    def pack(self) -> PreparedRow:
        """Put all media into one tensor, to travel to another process."""
        if not self.media:
            return self
        empty = [replace(medium, views=torch.empty_like(medium.views, device="meta")) for medium in self.media]
        return replace(self, media=empty, pixels=torch.cat([medium.views.flatten() for medium in self.media]))

    def unpack(self) -> PreparedRow:
        """Take the media out of one tensor, which may then be freed."""
        if self.pixels is None:
            return self
        parts = self.pixels.clone().split([medium.views.numel() for medium in self.media])
        media = [
            replace(medium, views=part.view(medium.views.shape)) for medium, part in zip(self.media, parts, strict=True)
        ]
        return replace(self, media=media, pixels=None)


class RowReader(Dataset[PreparedRow]):
    """Rows as a data set whose indices are the rows themselves, drawn from a stream.

    Args:
        sources: of the stream.
        readings: for each source, what the user says of its rows and pictures.
        preparer: makes tokens.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        readings: Sequence[Reading],
        preparer: RecordPreparer,
    ) -> None:
        self.sources, self.readings, self.preparer = sources, readings, preparer
        self.images = preparer.processor.image_processor

    def __getitem__(self, drawn: Drawn) -> PreparedRow:
        """Prepare a row. What is wrong with it becomes its `problem`, since an error would end the worker."""
        row = drawn.row
        prepared = PreparedRow(drawn.number, row.place)
        try:
            record, sequences, loader = self.prepare(row, drawn.place.source)
            if not sequences:  # --too-long drop
                return replace(prepared, problem=self.preparer.too_long_words, is_left_out=True)
            loaded = [loader.load_medium(x.source, x.kind) for x in record.sources]
            media = [self.images.read(medium) for medium in loaded]
        except VLMError as error:
            return replace(prepared, problem=str(error))
        notes = [(short_name(medium.source), medium.notes) for medium in loaded if medium.notes]
        name = record.place if record.id == f"{record.unit} {record.line}" else f"{record.id!r} ({record.place})"
        prepared = replace(prepared, name=name, sequences=sequences, media=media, notes=notes)
        return prepared if torch.utils.data.get_worker_info() is None else prepared.pack()

    def prepare(self, row: Row, source_index: int) -> tuple[Record, list[LearnedSequence], MediaLoader]:
        """Check a row and make its tokens, without decoding an image.

        Returns:
            The record, what is learned of it, and a loader of its images.

        Raises:
            VLMError: if the row cannot be used.
        """
        source, reading = self.sources[source_index], self.readings[source_index]
        held = {x.reference: x.data for x in _find_embedded(row.data)}

        def read_inside(reference: str) -> bytes:
            return held[reference] if reference in held else source.bytes_of(reference)

        loader = reading.loader(source, read_inside)
        record = read_record(row, source.name, reading.columns)
        MediaCheck(loader).check(record.sources, thorough=True)
        return record, self.preparer.prepare(record, loader), loader


def _find_embedded(value: Any) -> Iterator[Embedded]:
    """Yield the pictures and clips that a row brings along."""
    if isinstance(value, Embedded):
        yield value
    elif isinstance(value, (dict, list)):
        for x in value.values() if isinstance(value, dict) else value:
            yield from _find_embedded(x)


def begin_worker(number: int) -> None:
    """Prepare a worker process: Ctrl-C is the main process's, and one worker is one thread."""
    ignore_interrupt(number)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise, tokenizers warns that it was copied
