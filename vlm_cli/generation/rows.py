"""Prompts on their way to an answer, and the rows of a source as such prompts.

    {"prompt": "<image:a.png>What is it?", "id": 7}
    {"prompt": "<image> or <image>?", "images": ["a.png", "b.png"]}
    {"prompt": "<video>What happens?", "videos": ["a.mp4?frames=4"]}
    {"messages": [{"role": "user", "content": "<image>What is it?"}], "images": ["a.png"]}

A row is of one of the formats of `data.formats`. The model answers its last question. The row need not have an answer;
one that it has is not read. All keys of a row stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm_cli.data.formats import Format, recognise_question
from vlm_cli.data.formats.requests import is_request
from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.meant import find_mentions
from vlm_cli.data.record import Content, Segment
from vlm_cli.data.sources import Embedded, Source
from vlm_cli.data.sources import Row as SourceRow
from vlm_cli.errors import LanguageModelError, MediaError, PromptError, VLMError
from vlm_cli.media import MediaLoader
from vlm_cli.plain_data import is_finite
from vlm_cli.prompt import Medium, Text
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
        line: number of its line or row, from 1.
        ids: tokens of the prompt, one for each medium.
        sources: the images and clips, in reading order.
        media: the size of each medium.
        positions: that the prompt takes in the language model.
        room: new tokens that an answer may have.
        images: the place of each medium; a worker process fills it. Empty again once the row is done.
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
            LanguageModelError: if the chat template cannot write the prompt, or no token ends earlier answers.
        """
        turns = [
            Segment(tuple(add_clip_texts(turn.parts, plan.processor, loader.choose_frames)), turn.is_target)
            for turn in (*earlier, Segment(tuple(parts), False))
        ]
        *before, asked = turns
        end_id = plan.end_id if before and not is_turns else None
        self.ids = plan.writer.encode(asked.parts, is_turns=is_turns, system=system, earlier=before, end_id=end_id)
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
        origin: the row as it stands in the file.
        place: where it stands, for messages.
        data: the keys of the row, without an error that an earlier run may have left.
        mentions: picture files and tags that the prompt names without showing a picture.
        notes: what the user should know of how the row was read.
    """

    origin: SourceRow
    place: str
    data: dict[str, Any] = field(default_factory=dict)
    mentions: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def cut(self) -> list[int]:
        """The tokens of the longest of its answers that their length has ended."""
        found = [answer.new_tokens for answer in self.answers or () if answer.finish_reason == "length"]
        return [max(found)] if found else []

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of the row, with the answer, or with what everybody may read of the error."""
        data = _name_pictures(self.data)
        if self.error is not None:
            return {**data, "error": f"{self.place}: {self.error.public}"}
        assert self.answers is not None
        sequences = [answer.to_dict() for answer in self.answers]
        more = {"sequences": sequences} if len(sequences) > 1 else {}
        return {**data, **sequences[0], **more}


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of a source for one model.

    Args:
        plan: how the model answers.
        loader: finds images.
        source: of the rows.
        format: of every row; None recognises each.
    """

    plan: GenerationPlan
    loader: MediaLoader
    source: Source
    format: Format | None = None

    def read(self, origin: SourceRow) -> FileRow:
        """Read a row; one that cannot be answered has an `error`."""
        place = origin.place if len(self.source.shards) > 1 else f"{origin.unit} {origin.number}"
        row = FileRow(line=origin.number, origin=origin, place=place)
        try:
            self._fill(row)
        except (RecordError, PromptError, LanguageModelError, MediaError) as error:
            row.error = error.with_traceback(None)
        return row

    def _fill(self, row: FileRow) -> None:
        if row.origin.problem is not None:
            raise RecordError(row.origin.problem)
        data = row.origin.data
        row.data = {key: x for key, x in data.items() if key != "error" and is_finite(_name_pictures(x))}
        if lost := [key for key in data if key not in row.data and key != "error"]:
            raise RecordError(f'"{lost[0]}" holds a number that JSON cannot write, such as NaN or 1e400.')
        if taken := [key for key in ANSWER_KEYS if key in data]:
            raise RecordError(
                f'"{taken[0]}" is a key of the answer, which would overwrite yours. Rename the key in this '
                f"{row.origin.unit}."
            )
        asked = self._read_question(data)
        row.notes = asked.notes
        parts = [part for segment in asked.segments for part in segment.parts]
        if any(isinstance(part, Medium) and part.is_stdin for part in parts):
            raise RecordError("the image '-' means standard input, which the rows of a file cannot share. Give a file.")
        *earlier, last = asked.segments
        row.mentions = find_mentions(last.parts, self.loader)
        row.encode(self.plan, last.parts, self.loader, is_turns=asked.is_turns, system=asked.system, earlier=earlier)
        row.reserve(self.plan)

    def _read_question(self, data: dict[str, Any]) -> Content:
        if self.format is None and is_request(data):
            raise RecordError("is a request of OpenAI's protocol among other rows. Put the requests into a file alone.")
        return (self.format or recognise_question(data)).read_question(data)


def _name_pictures(data: Any) -> Any:
    """Return the values of a row with the names of pictures in the place of those that a shard holds."""
    if isinstance(data, Embedded):
        return data.reference
    if isinstance(data, dict):
        return {key: _name_pictures(x) for key, x in data.items()}
    return [_name_pictures(x) for x in data] if isinstance(data, list) else data
