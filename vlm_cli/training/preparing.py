"""From a record to the sequences that a model learns: tokens and media, and whether its context holds them.

N tokens of a sequence, F frames.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.record import Record, Segment
from vlm_cli.media import MediaLoader
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium
from vlm_cli.templates.clip_text import add_clip_texts
from vlm_cli.tiling import MediumSize
from vlm_cli.training.data_settings import TooLong
from vlm_cli.training.encoder import EncodedRecord, RecordEncoder
from vlm_cli.writing.media import measure_media
from vlm_cli.writing.plain import find_end_token
from vlm_cli.writing.writer import PromptWriter

__all__ = ["LearnedSequence", "RecordPreparer"]


@dataclass(frozen=True)
class LearnedSequence:
    """What the model learns of a record at a time: all of it, or its turns up to one.

    Attributes:
        ids: int[N] tokens.
        is_target: bool[N], whether the model learns the token.
        media: images and clips, in reading order.
        num_frames: number of images, and of frames of clips.
        positions: of the language model that it takes.
        was_split: a token over the border of prompt and completion was split.
    """

    ids: np.ndarray
    is_target: np.ndarray
    media: tuple[Medium, ...]
    num_frames: int
    positions: int
    was_split: bool


class RecordPreparer:
    """Prepares records for one model.

    Args:
        model: the model that learns them.
        processor: of the model.
        writer: turns prompts into tokens; None for prompts as they stand.
        too_long: what becomes of a record that the language model's context does not hold: it is an error, it is left
            out, or what does not fit is cut off its end.

    Attributes:
        dropped: places of the records that were left out.
        cut: places of those that were cut.
    """

    def __init__(
        self,
        model: VLM,
        processor: VLMProcessor,
        writer: PromptWriter | None = None,
        too_long: TooLong = "error",
    ) -> None:
        self.processor, self.too_long = processor, too_long
        self.dropped: list[str] = []
        self.cut: list[str] = []
        self._budget = ContextBudget.of(model)
        self._encoder = RecordEncoder(
            writer or PromptWriter(processor),
            find_end_token(model, processor),
            stop_token_ids(model.generation_config, processor.tokenizer, model.config),
        )

    @property
    def notes(self) -> list[str]:
        """What the user should know of how the records so far were written."""
        notes = list(self._encoder.notes)
        for places, what in ((self.dropped, "left out"), (self.cut, "cut")):
            if places:
                are = "is" if len(places) == 1 else "are"
                notes.append(
                    f"Note: {count_of(len(places), 'record')} {are} longer than the {self._budget.context:,} positions "
                    f"of the language model and {'was' if are == 'is' else 'were'} {what}, as {places[0]}."
                )
        return notes

    @property
    def too_long_words(self) -> str:
        """Say of a record that was left out why it was."""
        return f"is longer than the {self._budget.context:,} positions of the language model."

    def prepare(self, record: Record, loader: MediaLoader) -> list[LearnedSequence]:
        """Return the sequences of a record, the longest last; none of one that is left out. No pixel is decoded.

        Raises:
            VLMError: if a medium cannot be read, the chat template cannot write the record, or it is too long.
        """
        record = self._with_clip_texts(record, loader)
        encoded = self._encoder.encode(record)
        sizes = measure_media(record.sources, loader, self.processor.image_processor)
        longest = encoded[-1]
        if problem := self._budget.problem(len(longest.ids), sizes[: longest.num_media]):
            if self.too_long == "error" or self._budget.media_problem(sizes[: longest.num_media]):
                raise RecordError(problem)
            encoded = [] if self.too_long == "drop" else [y for x in encoded if (y := self._shorten(x, sizes))]
            (self.cut if encoded else self.dropped).append(record.place)
        return [
            LearnedSequence(
                np.array(x.ids, np.int32),
                np.array(x.is_target, np.bool_),
                record.sources[: x.num_media],
                sum(size.num_frames for size in sizes[: x.num_media]),
                self._budget.positions(len(x.ids), sizes[: x.num_media]),
                x.was_split,
            )
            for x in encoded
        ]

    def _shorten(self, encoded: EncodedRecord, sizes: Sequence[MediumSize]) -> EncodedRecord | None:
        """Cut tokens off the end until the rest fits; None if it has nothing to learn."""
        media_id = self.processor.media_token_id

        def is_too_long(num_tokens: int) -> bool:
            media = sizes[: encoded.ids[:num_tokens].count(media_id)]
            return self._budget.problem(num_tokens, media) is not None

        # The numbers of tokens that fit stand before those that do not.
        kept = bisect.bisect_left(range(len(encoded.ids) + 1), True, key=is_too_long) - 1
        ids, is_target = encoded.ids[:kept], encoded.is_target[:kept]
        if not any(is_target):
            return None
        return encoded._replace(ids=ids, is_target=is_target, num_media=ids.count(media_id))

    def _with_clip_texts(self, record: Record, loader: MediaLoader) -> Record:
        """Put the composition's text around each clip of a record."""
        segments = (
            Segment(tuple(add_clip_texts(segment.parts, self.processor, loader.choose_frames)), segment.is_target)
            for segment in record.segments
        )
        return replace(record, segments=tuple(segments))
