"""Prompts on their way to an answer, and the lines of a file as such prompts.

    {"prompt": "<image:a.png>What is it?", "id": 7}
    {"prompt": "<image> or <image>?", "images": ["a.png", "b.png"]}
    {"prompt": "<video>What happens?", "videos": ["a.mp4?frames=4"]}
    {"messages": [{"role": "user", "content": "<image>What is it?"}], "images": ["a.png"]}

A prompt follows the grammar of `vlm generate`; chat messages and LLaVA conversations end with the turn to answer. Other
keys of a line stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm_cli.data.formats import find_turns
from vlm_cli.data.formats.ours import get_files
from vlm_cli.data.jsonl import Line, RecordError, get_field, parse_object
from vlm_cli.data.meant import check_picture_keys, find_mentions
from vlm_cli.data.record import Content, Segment
from vlm_cli.errors import LanguageModelError, MediaError, PromptError, VLMError
from vlm_cli.media import MediaLoader
from vlm_cli.plain_data import is_finite
from vlm_cli.prompt import Medium, Text, interleave
from vlm_cli.templates.clip_text import add_clip_texts
from vlm_cli.writing.media import measure_media

if TYPE_CHECKING:
    from vlm_cli.generation.encoded_image import ImageSlot
    from vlm_cli.generation.plan import Answer, GenerationPlan
    from vlm_cli.tiling import MediumSize

__all__ = ["FileRow", "Row", "RowReader"]

ANSWER_KEYS = ("text", "new_tokens", "finish_reason", "sequences")


@dataclass(eq=False, kw_only=True)
class Row:
    """A prompt, and later its answers or an error.

    Attributes:
        line: number of its line in the file, from 1.
        ids: tokens of the prompt, one for each medium.
        sources: the images and clips, in reading order.
        media: the size of each medium.
        positions: that the prompt takes in the language model.
        room: new tokens that an answer may have.
        images: the place of each medium; a worker process fills it.
        answers: None until the model has answered.
        error: why the row cannot be answered.
    """

    line: int
    ids: list[int] = field(default_factory=list)
    sources: list[Medium] = field(default_factory=list)
    media: list[MediumSize] = field(default_factory=list)
    positions: int = 0
    room: int = 0
    images: list[ImageSlot] = field(default_factory=list)
    answers: list[Answer] | None = None
    error: VLMError | None = None

    @property
    def is_done(self) -> bool:
        return self.answers is not None or self.error is not None

    def encode(
        self,
        plan: GenerationPlan,
        parts: Sequence[Text | Medium],
        loader: MediaLoader,
        *,
        is_turns: bool = False,
        system: str | None = None,
        earlier: Sequence[Segment] = (),
    ) -> None:
        """Turn the prompt into tokens, sources and sizes of media. The last arguments are those of `PromptWriter`.

        Raises:
            MediaError: if the header of a clip cannot be read.
        """
        turns = [
            Segment(tuple(add_clip_texts(turn.parts, plan.processor, loader.choose_frames)), turn.is_target)
            for turn in (*earlier, Segment(tuple(parts), False))
        ]
        *before, asked = turns
        self.ids = plan.writer.encode(asked.parts, is_turns=is_turns, system=system, earlier=before)
        self.sources = [part for turn in turns for part in turn.parts if isinstance(part, Medium)]
        self.media = measure_media(self.sources, loader, plan.processor.image_processor)

    def reserve(self, plan: GenerationPlan) -> None:
        """Count the positions of the prompt, and the new tokens that fit after it.

        Raises:
            PromptError: if the model cannot take a prompt of this length, or so many media.
        """
        plan.budget.check_media(self.media)
        self.positions = plan.budget.positions(len(self.ids), self.media)
        self.room = plan.room(self.positions, media=self.media)


@dataclass(eq=False, kw_only=True)
class FileRow(Row):
    """A row of a file of prompts.

    Attributes:
        source_line: the line as it stands in the file.
        data: the keys of the line, without an error that an earlier run may have left.
        mentions: picture files and tags that the prompt names without showing a picture.
    """

    source_line: Line
    data: dict[str, Any] = field(default_factory=dict)
    mentions: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of the line, with the answer, or with what everybody may read of the error."""
        if self.error is not None:
            return {**self.data, "error": f"line {self.line}: {self.error.public}"}
        assert self.answers is not None
        sequences = [answer.to_dict() for answer in self.answers]
        more = {"sequences": sequences} if len(sequences) > 1 else {}
        return {**self.data, **sequences[0], **more}


@dataclass(frozen=True)
class RowReader:
    """Reads lines as rows for one model.

    Args:
        plan: how the model answers.
        loader: finds images.
    """

    plan: GenerationPlan
    loader: MediaLoader

    def read(self, line: Line) -> FileRow:
        """Read a line; a row that cannot be answered has an `error`."""
        row = FileRow(line=line.number, source_line=line)
        try:
            self._fill(row)
        except (RecordError, PromptError, LanguageModelError, MediaError) as error:
            row.error = error.with_traceback(None)
        return row

    def _fill(self, row: FileRow) -> None:
        data = parse_object(row.source_line.raw)
        row.data = {key: x for key, x in data.items() if key != "error" and is_finite(x)}
        if lost := [key for key in data if key not in row.data and key != "error"]:
            raise RecordError(f'"{lost[0]}" holds a number that JSON cannot write, such as NaN or 1e400.')
        if taken := [key for key in ANSWER_KEYS if key in data]:
            raise RecordError(
                f'"{taken[0]}" is a key of the answer, which would overwrite yours. Rename the key in this line.'
            )
        asked = _read_question(data)
        parts = [part for segment in asked.segments for part in segment.parts]
        if any(isinstance(part, Medium) and part.is_stdin for part in parts):
            raise RecordError("the image '-' means standard input, which the rows of a file cannot share. Give a file.")
        *earlier, last = asked.segments
        row.mentions = find_mentions(last.parts, self.loader)
        row.encode(self.plan, last.parts, self.loader, is_turns=asked.is_turns, system=asked.system, earlier=earlier)
        row.reserve(self.plan)


def _read_question(data: dict[str, Any]) -> Content:
    """Return what a row asks: its prompt, or its turns, the last of which is the question.

    Raises:
        RecordError, PromptError: if the row asks nothing, or its placeholders and files do not match.
    """
    if (turns := find_turns(data)) is not None:
        return turns.read_question(data)
    prompt = get_field(data, "prompt", str, "text")
    images, videos = get_files(data, "image"), get_files(data, "video")
    check_picture_keys(data, [prompt])
    parts = interleave(prompt, images, videos, given_with='"images"').parts
    return Content((Segment(tuple(parts), False),))
