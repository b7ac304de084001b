"""Lines of a file as prompts: one JSON object each, and a message where one is no prompt.

    {"prompt": "<image:a.png>What is it?", "id": 7}
    {"prompt": "<image> or <image>?", "images": ["a.png", "b.png"]}

Prompts are read as `vlm generate` reads one; other keys are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vlm_cli.data.jsonl import Line, RecordError, get_field, parse_object
from vlm_cli.data.records import get_images
from vlm_cli.errors import PromptError
from vlm_cli.generation.decoder import Decoder
from vlm_cli.generation.encoded_image import ImageSlot
from vlm_cli.modeling.budget import MediumSize
from vlm_cli.prompt import Medium, interleave

__all__ = ["Row", "RowReader"]

ANSWER = ("text", "new_tokens", "finish_reason", "sequences")  # keys of an answer


@dataclass(eq=False)
class Row:
    """A prompt on its way to an answer, or to an error."""

    line: Line
    data: dict[str, Any] = field(default_factory=dict)  # what the line holds
    sources: list[str] = field(default_factory=list)  # of its images, in order
    ids: list[int] = field(default_factory=list)
    positions: int = 0  # of the prompt in the language model
    room: int = 0  # most new tokens
    images: list[ImageSlot] = field(default_factory=list)
    sequences: list[dict[str, Any]] | None = None
    error: str | None = None

    @property
    def is_done(self) -> bool:
        return self.sequences is not None or self.error is not None

    def fail(self, reason: str) -> None:
        self.error = f"line {self.line.number}: {reason}"

    def answer(self) -> dict[str, Any]:
        """The line's own keys, with the answer or the error."""
        if self.error is not None:
            return {**self.data, "error": self.error}
        assert self.sequences is not None
        more = {"sequences": self.sequences} if len(self.sequences) > 1 else {}
        return {**self.data, **self.sequences[0], **more}


@dataclass
class RowReader:
    """Reads prompts for one model.

    Args:
        decoder: of that model.
        special_tokens: read the spelling of special tokens as tokens.
    """

    decoder: Decoder
    special_tokens: bool = False

    def read(self, line: Line) -> Row:
        """The row of a line; one that cannot be answered has an `error`."""
        row = Row(line)
        try:
            self._fill(row)
        except (RecordError, PromptError) as error:
            row.fail(str(error))
        return row

    def _fill(self, row: Row) -> None:
        data = parse_object(row.line.raw)
        row.data = {key: x for key, x in data.items() if key != "error"}  # an earlier run's
        prompt, images = get_field(data, "prompt", str, "text"), get_images(data)
        if taken := [key for key in ANSWER if key in data]:
            raise RecordError(f'"{taken[0]}" is where the answer goes. Give that key of yours another name.')
        parts = interleave(prompt, images, given_with='"images"').parts
        sources = [part.source for part in parts if isinstance(part, Medium)]
        if "-" in sources:
            raise RecordError("the image '-' would be read from standard input, which rows do not share. Give a file.")
        self.decoder.budget.check_media(len(sources))
        ids = self.decoder.processor.encode(parts, parse_special_tokens=self.special_tokens)
        row.positions = self.decoder.budget.positions(len(ids), [MediumSize() for _ in sources])
        row.room = self.decoder.room(row.positions)
        row.ids, row.sources = ids, sources
