"""From a record to the sequences that a model learns: tokens and media, and whether its context holds them.

N tokens of a sequence, F frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.record import Record, Segment
from vlm_cli.media import MediaLoader
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium
from vlm_cli.templates.clip_text import add_clip_texts
from vlm_cli.training.encoder import RecordEncoder, find_end_token
from vlm_cli.writing.media import measure_media
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
    """

    def __init__(self, model: VLM, processor: VLMProcessor, writer: PromptWriter | None = None) -> None:
        self.processor = processor
        self._budget = ContextBudget.of(model)
        self._encoder = RecordEncoder(
            writer or PromptWriter(processor),
            find_end_token(model, processor),
            stop_token_ids(model.generation_config, processor.tokenizer, model.config),
        )

    @property
    def notes(self) -> list[str]:
        """What the user should know of how the records so far were written."""
        return self._encoder.notes

    def prepare(self, record: Record, loader: MediaLoader) -> list[LearnedSequence]:
        """Return the sequences of a record, the longest last. No pixel is decoded.

        Raises:
            VLMError: if a medium cannot be read, the chat template cannot write the record, or it is too long.
        """
        record = self._with_clip_texts(record, loader)
        encoded = self._encoder.encode(record)
        sizes = measure_media(record.sources, loader, self.processor.image_processor)
        longest = encoded[-1]
        if problem := self._budget.problem(len(longest.ids), sizes[: longest.num_media]):
            raise RecordError(problem)
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

    def _with_clip_texts(self, record: Record, loader: MediaLoader) -> Record:
        """Put the composition's text around each clip of a record."""
        segments = (
            Segment(tuple(add_clip_texts(segment.parts, self.processor, loader.choose_frames)), segment.is_target)
            for segment in record.segments
        )
        return replace(record, segments=tuple(segments))
