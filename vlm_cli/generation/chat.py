"""A conversation with a model that reads each turn once.

T_img media of the conversation, F frames, C H W pixels, n vision tokens of d channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from vlm_cli.errors import ContextError
from vlm_cli.generation.plan import Answer, GenerationPlan, ignore_message
from vlm_cli.modeling.batching import MediumPixels, stack_grids, stack_media, stack_pixels
from vlm_cli.modeling.prompt_cache import PromptCache
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.clip_text import add_clip_texts, chosen_of, split_clips
from vlm_cli.templates.conversation import Conversation, Markers
from vlm_cli.tiling import MediumSize
from vlm_cli.writing.turns import Exchange

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from vlm_cli.media import LoadedClip, LoadedImage

__all__ = ["Chat", "ChatAnswer"]


@dataclass(frozen=True)
class EncodedMedia:
    """All images and clips of a conversation.

    Attributes:
        sizes: of each.
        pixels: of each; empty if they are not needed again.
        tokens: float[1, T_img, n, d], the vision tokens; None without media.
        mask: bool[1, T_img, n], which of them are valid.
        keys: of each, equal where two have the same tokens; None if their tokens depend on each other.
    """

    sizes: tuple[MediumSize, ...] = ()
    pixels: tuple[MediumPixels, ...] = ()
    tokens: Tensor | None = None
    mask: Tensor | None = None
    keys: tuple[bytes, ...] | None = None


@dataclass(frozen=True)
class ChatAnswer:
    """The answer to one turn.

    Attributes:
        turn: number of the turn, from 1.
        answer: what the model wrote.
        prompt_positions: that the conversation takes before the answer.
        reused_positions: those of them that the model had read in earlier turns.
        seconds: that the turn took.
    """

    turn: int
    answer: Answer
    prompt_positions: int
    reused_positions: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that `vlm chat --json` prints."""
        return {
            "turn": self.turn,
            **self.answer.to_dict(),
            "prompt_positions": self.prompt_positions,
            "reused_positions": self.reused_positions,
            "seconds": round(self.seconds, 3),
        }


class Chat:
    """A conversation, to which each answered turn is added. A turn that fails changes nothing.

    Args:
        plan: how the model answers, with one answer and no beams; its writer says how turns are written.
    """

    def __init__(self, plan: GenerationPlan) -> None:
        self.plan, self.model = plan, plan.model
        self.begin(plan.writer.system)

    def begin(self, system: str | None) -> None:
        """Forget what was said, and begin with this system text, or with none."""
        self.conversation = Conversation.begin(self.plan.writer.turn_format, system)
        self.media = EncodedMedia()
        self.cache = PromptCache()
        self.turns = 0

    @torch.inference_mode()
    def resume(self, turns: Sequence[Exchange], media: Sequence[LoadedImage | LoadedClip], system: str | None) -> None:
        """Take up a conversation in the place of this one; if that fails, this one stays.

        Args:
            turns: what was said, in its order.
            media: the images and clips of all turns.
            system: what the model is told before the first turn.

        Raises:
            ContextError: if the conversation has no room for an answer.
            LanguageModelError: if the model's chat template cannot write it.
        """
        processor = self.plan.processor
        choose = chosen_of(media)
        asks = [add_clip_texts(turn.asks, processor, choose) for turn in turns]
        conversation = Conversation.begin(self.plan.writer.turn_format, system)
        texts = [part.text for parts in asks for part in parts if isinstance(part, Text)]
        answers = [turn.answer for turn in turns]
        markers = Markers.absent_from(conversation.format.template or "", system or "", *texts, *answers)
        for parts, answer in zip(asks, answers, strict=True):
            conversation = conversation.ask(parts, markers).recall(answer)
            self._positions(conversation, ())  # each turn renders all before it: a file may hold too many for that
        pixels = [processor.image_processor.read(medium) for medium in split_clips(media, processor)]
        sizes = tuple(medium.size for medium in pixels)
        self._positions(conversation, sizes)
        self.media = self._encode(pixels, sizes, EncodedMedia())
        self.conversation, self.cache, self.turns = conversation, PromptCache(), len(turns)

    @torch.inference_mode()
    def answer(
        self,
        parts: Sequence[Text | Medium],
        media: Sequence[LoadedImage | LoadedClip],
        *,
        streamer: BaseStreamer | None = None,
        notify: Callable[[str], None] = ignore_message,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> ChatAnswer:
        """Answer a turn.

        Args:
            parts: of the turn, in reading order.
            media: the images and clips among them.
            streamer: receives tokens as the model writes them.
            notify: receives what the user should know.
            is_interrupted: is called after each token; true ends the answer.

        Raises:
            ContextError: if the conversation has no room for an answer.
            LanguageModelError: if the model's chat template cannot write it.
        """
        started = time.monotonic()
        asked = self.conversation.ask(add_clip_texts(parts, self.plan.processor, chosen_of(media)))
        shown_media = split_clips(media, self.plan.processor)
        pixels = [self.plan.processor.image_processor.read(medium) for medium in shown_media]
        sizes = (*self.media.sizes, *(medium.size for medium in pixels))
        positions = self._positions(asked, sizes)
        room = self.plan.room(positions, notify, sizes)
        shown = self._encode(pixels, sizes, self.media)
        ids = torch.tensor([asked.ids])
        criteria = self.plan.stopping_criteria()
        criteria.append(_Interruption(is_interrupted))
        output = self.model.generate(
            lang_x=ids,
            attention_mask=torch.ones_like(ids),
            vision_tokens=shown.tokens,
            media_mask=shown.mask,
            vision_grid=stack_grids([sizes]).get("vision_grid"),
            prompt_cache=self.cache,
            media_keys=None if shown.keys is None else [shown.keys],
            streamer=streamer,
            stopping_criteria=criteria,
            **self.plan.keywords | {"max_new_tokens": room},
        )
        new = output[0, len(asked.ids) :].tolist()
        answer = self.plan.read(asked.ids, new, room)
        said = new[: answer.new_tokens - (answer.finish_reason == "stop_token")]
        self.conversation = asked.answer(said, answer.text, partial(self.plan.decode, asked.ids))
        self.media = shown
        self.turns += 1
        return ChatAnswer(self.turns, answer, positions, self.cache.reused, time.monotonic() - started)

    def _positions(self, asked: Conversation, sizes: Sequence[MediumSize]) -> int:
        """Count the positions of a conversation.

        Raises:
            ContextError: if they leave no room for an answer, or if the vision tokenizer takes fewer images.
        """
        budget = self.plan.budget
        if problem := budget.media_problem(sizes):
            raise ContextError(f"the conversation {problem} Start another one.")
        positions = budget.positions(len(asked.ids), sizes)
        left = budget.left(positions)
        if left is not None and left < 1:
            raise ContextError(
                f"the conversation takes {positions} positions with this turn, but the language model has "
                f"{budget.context}. Start another one, or use fewer images; `vlm inspect --prompt` shows what each "
                f"costs.{budget.tiles_hint(positions, sizes)}"
            )
        return positions

    def _encode(
        self, media: Sequence[MediumPixels], sizes: tuple[MediumSize, ...], known: EncodedMedia
    ) -> EncodedMedia:
        """Return all images and clips so far, with new ones.

        Only new ones pass the vision encoder, if a medium does not change the vision tokens of others.

        Args:
            media: the new ones.
            sizes: of all.
            known: those so far.
        """
        if not media:
            return known
        encodes_apart = self.model.encodes_media_independently
        if not encodes_apart:
            media = [*known.pixels, *media]
        given: dict[str, Any] = stack_pixels([media])
        tokens, mask = self.model.encode_vision(given.pop("pixel_values"), **given)
        if not encodes_apart:
            return EncodedMedia(sizes, tuple(media), tokens, mask)
        if known.tokens is not None and known.mask is not None:
            # A clip has more tokens than an image: the shorter ones are padded.
            tokens, mask = stack_media([[*known.tokens[0], *tokens[0]]], [[*known.mask[0], *mask[0]]])
        return EncodedMedia(sizes, (), tokens, mask, (*(known.keys or ()), *(x.digest for x in media)))


class _Interruption(StoppingCriteria):
    """Ends an answer when the user has pressed Ctrl-C."""

    may_wait = True

    def __init__(self, is_interrupted: Callable[[], bool]) -> None:
        self.is_interrupted = is_interrupted

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """int[B, L] so far -> bool[B], true where a row ends here."""
        return torch.full((len(input_ids),), self.is_interrupted(), dtype=torch.bool, device=input_ids.device)
