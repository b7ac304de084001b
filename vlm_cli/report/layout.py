"""The layout of a prompt: which positions each text and each image takes, and which images a text sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlm_cli.decoding import decode_after
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium, Text
from vlm_cli.tiling import MediumSize
from vlm_cli.writing.writer import PromptWriter

__all__ = ["PromptLayout", "Span", "lay_out"]


@dataclass(frozen=True)
class Span:
    """One text or one medium of a prompt.

    Attributes:
        kind: "text" or "medium".
        content: the text, or the source of the medium.
        tokens: number of tokens of `lang_x`.
        start, end: positions in the language model, end excluded.
        sees: numbers, from 1, of the media that these positions see.
    """

    kind: str
    content: str
    tokens: int
    start: int
    end: int
    sees: list[int]

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
) -> PromptLayout:
    """Return the layout of a prompt of still images.

    Args:
        model: on any device; shapes are enough.
        processor: the model's processor.
        parts: the prompt.
        writer: turns the prompt into tokens; None for the prompt as it stands.
    """
    ids = (writer or PromptWriter(processor)).encode(parts)
    budget = ContextBudget.of(model)
    spans: list[Span] = []
    sources = iter([part.source for part in parts if isinstance(part, Medium)])
    number = start = read = 0
    for run, is_media in _runs(ids, processor.media_token_id):
        number += is_media
        end = start + budget.positions(len(run), [MediumSize()] * is_media)
        before = ids[:read]
        read += len(run)
        text = decode_after(processor.tokenizer, before, run, skip_special_tokens=False)
        content = next(sources) if is_media else text
        spans.append(Span("medium" if is_media else "text", content, len(run), start, end, model.media_seen(number)))
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
