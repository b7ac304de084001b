"""The layout of a prompt: which positions each text and each image takes, and which images a text sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlm_cli.decoding import decode_after
from vlm_cli.errors import PromptError
from vlm_cli.media import MediaLoader
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.clip_text import add_clip_texts
from vlm_cli.tiling import MediumSize
from vlm_cli.writing.media import measure_media
from vlm_cli.writing.writer import PromptWriter

__all__ = ["PromptLayout", "Span", "lay_out", "lay_out_ids"]


@dataclass(frozen=True)
class Span:
    """One text or one medium of a prompt.

    Attributes:
        kind: "text", "medium" (an image) or "video".
        content: the text, or the source of the medium.
        tokens: number of tokens of `lang_x`.
        start, end: positions in the language model, end excluded.
        sees: numbers, from 1, of the media that these positions see.
        frames: of a clip; None for an image or a text.
        tiles: (rows, columns) of an image that is cut; None for any other span.
        vision_tokens: of a medium; None for a text.
    """

    kind: str
    content: str
    tokens: int
    start: int
    end: int
    sees: list[int]
    frames: int | None = None
    tiles: tuple[int, int] | None = None
    vision_tokens: int | None = None

    @property
    def positions(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class PromptLayout:
    """A prompt as a list of spans.

    Attributes:
        spans: in the order of the prompt.
        ids: tokens of `lang_x`.
        positions: positions of the language model that the prompt takes.
        context: most positions of the language model; None for no limit.
    """

    spans: list[Span]
    ids: list[int]
    positions: int
    context: int | None

    @property
    def left(self) -> int | None:
        """Return the positions that remain for an answer; None for no limit."""
        return None if self.context is None else self.context - self.positions

    def to_dict(self) -> dict[str, Any]:
        spans = [{**asdict(span), "positions": span.positions} for span in self.spans]
        return {
            "spans": spans, "ids": self.ids, "positions": self.positions, "context": self.context, "left": self.left
        }  # fmt: skip


def lay_out(
    model: VLM,
    processor: VLMProcessor,
    parts: Sequence[Text | Medium],
    writer: PromptWriter | None = None,
    loader: MediaLoader | None = None,
) -> PromptLayout:
    """Return the layout of a prompt.

    Args:
        model: on any device; shapes are enough.
        processor: the model's processor.
        parts: the prompt.
        writer: turns the prompt into tokens; None for the prompt as it stands.
        loader: finds the files of clips, whose frames are counted, and of images that are cut into tiles; None finds
            any path.

    Raises:
        MediaError: if one of these files cannot be read.
        PromptError: if the vision tokenizer cannot take a medium.
    """
    loader = loader or MediaLoader()
    parts = add_clip_texts(parts, processor, loader.choose_frames)
    ids = (writer or PromptWriter(processor)).encode(parts)
    measured = measure_media(parts, loader, processor.image_processor)
    if problem := ContextBudget.of(model).frames_problem(measured):
        raise PromptError(f"the prompt {problem}")
    return lay_out_ids(model, processor, parts, ids, measured)


def lay_out_ids(
    model: VLM,
    processor: VLMProcessor,
    parts: Sequence[Text | Medium],
    ids: list[int],
    measured: Sequence[MediumSize],
) -> PromptLayout:
    """Return the layout of a prompt whose media are measured.

    Args:
        model: on any device; shapes are enough.
        processor: the model's processor.
        parts: the prompt, with the texts around its clips.
        ids: its tokens.
        measured: the size of each medium.
    """
    budget = ContextBudget.of(model)
    spans: list[Span] = []
    media = [part for part in parts if isinstance(part, Medium)]
    shown = iter(zip(media, measured, strict=True))
    number = start = read = 0
    for run, is_media in _runs(ids, processor.media_token_id):
        number += is_media
        medium, size = next(shown) if is_media else (None, None)
        end = start + budget.positions(len(run), [] if size is None else [size])
        text = decode_after(processor.tokenizer, ids[:read], run, skip_special_tokens=False)
        read += len(run)
        content = text if medium is None else medium.source
        kind = "text" if medium is None else "medium" if medium.kind == "image" else "video"
        frames = None if medium is None or size is None or medium.kind == "image" else size.num_frames
        tiles = (size.rows, size.columns) if size is not None and size.rows else None
        tokens = None if size is None else model.num_vision_tokens(size)
        spans.append(Span(kind, content, len(run), start, end, model.media_seen(number), frames, tiles, tokens))
        start = end
    return PromptLayout(spans, ids, start, budget.context)


def _runs(ids: Sequence[int], media_id: int) -> list[tuple[list[int], bool]]:
    """Group ids into runs of text; each media token is a run of its own. The flag tells which."""
    runs: list[tuple[list[int], bool]] = []
    for i in ids:
        is_media = i == media_id
        if is_media or not runs or runs[-1][1]:
            runs.append(([i], is_media))
        else:
            runs[-1][0].append(i)
    return runs
