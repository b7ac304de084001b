"""From what a request asks for to rows that the engine can answer: tokens, pictures, and the room that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlm_cli.errors import MediaError, PromptError, VLMError
from vlm_cli.generation.encoded_image import ImageSlot
from vlm_cli.generation.images import ImageCache, Preprocessor
from vlm_cli.generation.plan import GenerationPlan
from vlm_cli.media import MediaLoader
from vlm_cli.prompt import Medium, Text
from vlm_cli.serving.limits import Limits
from vlm_cli.serving.requests import Ask, BadRequest
from vlm_cli.serving.row import Piece, ServedRow
from vlm_cli.templates.clip_text import add_clip_texts
from vlm_cli.templates.conversation import Message
from vlm_cli.tiling import MediumSize
from vlm_cli.writing.choice import AUTO, TemplateChoice
from vlm_cli.writing.writer import PromptWriter

if TYPE_CHECKING:
    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor

__all__ = ["Prepared", "Preparer", "make_plan"]

CACHED_FRAMES = 256  # of pictures that later requests may show again, as the turns of a chat do


@dataclass
class Prepared:
    """The rows of a request, and what its prompts hold.

    Attributes:
        rows: `num_answers` for each prompt, in their order.
        prompt_tokens: of all prompts, each image with all of its positions.
        media: the size of each medium, of all prompts.
        media_tokens: the positions of each.
    """

    rows: list[ServedRow]
    prompt_tokens: int
    media: list[MediumSize] = field(default_factory=list)
    media_tokens: list[int] = field(default_factory=list)


def make_plan(model: VLM, processor: VLMProcessor, limits: Limits, choice: TemplateChoice = AUTO) -> GenerationPlan:
    """Return how a model answers requests; how tokens are chosen, each request says itself."""
    keywords = {"max_new_tokens": limits.new_tokens, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    none = dict.fromkeys(("temperature", "top_p", "top_k"))  # what generation_config.json may set
    return GenerationPlan(model, processor, {**keywords, **none}, writer=PromptWriter(processor, choice))


class Preparer:
    """Prepares requests for one model; several threads may do so at once.

    Args:
        plan: of the model.
        limits: of the server.
        make_loader: returns what fetches and decodes the media of one request.
        keeps_files: a file or an address means the same picture in all requests, as in the rows of one file.
    """

    def __init__(
        self,
        plan: GenerationPlan,
        limits: Limits,
        make_loader: Callable[[], MediaLoader],
        *,
        keeps_files: bool = False,
    ) -> None:
        self.plan, self.limits, self.make_loader, self.keeps_files = plan, limits, make_loader, keeps_files
        self._cache = ImageCache(CACHED_FRAMES)
        self._lock = threading.Lock()  # of the cache, and of the tokenizer, which not every thread may use at once

    def prepare(self, ask: Ask, tell: Callable[[int, Piece], None]) -> Prepared:
        """Turn prompts into rows.

        Args:
            ask: what the request asks for.
            tell: receives the number of a row, and each of its pieces.

        Raises:
            BadRequest: for a picture that cannot be read, or a prompt that the model cannot take.
        """
        deadline = time.monotonic() + self.limits.seconds
        prepared = Prepared([], 0)
        for prompt in ask.prompts:
            try:
                row = self._read(prompt)
                row.room = self.plan.budget.room(row.positions, ask.new_tokens or self.limits.new_tokens, row.media)
            except BadRequest:
                raise
            except VLMError as error:
                raise BadRequest(error.public, code=_code_of(error)) from None
            prepared.prompt_tokens += row.positions
            prepared.media += row.media
            prepared.media_tokens += [self.plan.budget.positions(1, [size]) for size in row.media]
            for k in range(ask.num_answers):
                number = len(prepared.rows)
                seed = ask.sampling.seed
                prepared.rows.append(
                    ServedRow(
                        line=1,
                        ids=row.ids,
                        sources=row.sources,
                        media=row.media,
                        positions=row.positions,
                        room=row.room,
                        images=row.images,
                        stops=ask.stops,
                        sampling=ask.sampling.with_seed(None if seed is None else seed + k),
                        tell=lambda piece, number=number: tell(number, piece),  # type: ignore[misc]
                        deadline=deadline,
                    )
                )
        return prepared

    def _read(self, prompt: tuple[Message, ...] | str) -> ServedRow:
        loader = self.make_loader()
        row = ServedRow(line=1)
        parts = [Text(prompt)] if isinstance(prompt, str) else [x for m in prompt for x in m.parts]
        row.sources = [part for part in parts if isinstance(part, Medium)]
        if len(row.sources) > self.limits.images:
            raise BadRequest(
                f"the request has {len(row.sources)} images, and may have {self.limits.images}.", "messages"
            )
        row.images = [self._load(medium, loader) for medium in row.sources]
        row.media = [slot.image.size for slot in row.images if slot.image is not None]
        with self._lock:
            row.ids = self._encode(prompt, loader)
        if not row.ids:
            raise BadRequest("the prompt is empty: its messages have neither text nor pictures.", "messages")
        self.plan.budget.check_media(row.media)
        row.positions = self.plan.budget.positions(len(row.ids), row.media)
        return row

    def _encode(self, prompt: tuple[Message, ...] | str, loader: MediaLoader) -> list[int]:
        if isinstance(prompt, str):
            return self.plan.processor.encode([Text(prompt)])
        processor, written = self.plan.processor, []
        for message in prompt:
            parts = [part for part in message.parts if isinstance(part, (Text, Medium))]
            written.append(Message(message.role, tuple(add_clip_texts(parts, processor, loader.choose_frames))))
        return self.plan.writer.turn_format.encode_messages(written)

    def _load(self, medium: Medium, loader: MediaLoader) -> ImageSlot:
        """Return the slot of a medium, which is decoded once for all requests if its name says what it is.

        Raises:
            BadRequest: if it cannot be read.
        """
        slot = ImageSlot()
        if self.keeps_files or medium.source[:5].lower() == "data:":
            with self._lock:
                slot, _ = self._cache.find(medium)
        if slot.image is None and slot.error is None:
            found = Preprocessor(self.plan.processor.image_processor, loader)[[medium]][0]
            with self._lock:
                self._cache.fill(slot, found)
        if slot.error is not None:
            raise BadRequest(slot.error.public, "messages", code="invalid_image")
        return slot


def _code_of(error: VLMError) -> str | None:
    """Return OpenAI's name of an error."""
    if isinstance(error, PromptError) and "positions" in str(error):
        return "context_length_exceeded"
    return "invalid_image" if isinstance(error, MediaError) else None
