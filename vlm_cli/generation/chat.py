"""Turns to answers: a conversation with a model that reads each of them once.

T_img images of the conversation, C H W pixels, n vision tokens of d channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from vlm_cli.errors import ContextError
from vlm_cli.generation.conversation import Conversation, Script
from vlm_cli.generation.decoder import Decoder
from vlm_cli.modeling.budget import MediumSize
from vlm_cli.modeling.prompt_cache import PromptCache
from vlm_cli.prompt import Medium, Text

__all__ = ["Chat"]


@dataclass(frozen=True)
class Seen:
    """The images of a conversation: float[1, T_img, 1, C, H, W], float[1, T_img, n, d] and bool[1, T_img, n]."""

    pixels: Tensor | None = None  # None where they are not needed again
    tokens: Tensor | None = None
    mask: Tensor | None = None


class Chat:
    """A conversation that goes on.

    A turn that fails leaves it as it was.

    Args:
        decoder: of the model, with one answer and no beams.
        parse_special_tokens: read the special tokens that the user spells as the tokens.
    """

    def __init__(self, decoder: Decoder, *, parse_special_tokens: bool = False) -> None:
        self.decoder, self.model = decoder, decoder.model
        self.conversation = Conversation(Script(decoder.processor, parse_special_tokens=parse_special_tokens))
        self.seen = Seen()
        self.cache = PromptCache()
        self.turns = 0

    @torch.inference_mode()
    def answer(
        self,
        parts: Sequence[Text | Medium],
        images: Sequence[Any],
        *,
        streamer: Any = None,
        notify: Callable[[str], None] = lambda message: None,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """What the model answers to a turn.

        Args:
            parts: of the turn, in reading order.
            images: one for each medium among them.
            streamer: is given the tokens.
            notify: is told what the user should know.
            is_interrupted: whether the answer is to end here; asked after each token.

        Raises:
            ContextError: if the conversation has no room for an answer.
            LanguageModelError: if the model's chat template cannot write it.
        """
        started = time.monotonic()
        asked = self.conversation.ask(parts)
        positions = self._positions(asked)
        room = self.decoder.room(positions, notify)
        seen = self._see(images)
        ids = torch.tensor([asked.ids], device=self.model.device)
        output = self.model.generate(
            lang_x=ids,
            attention_mask=torch.ones_like(ids),
            vision_tokens=seen.tokens,
            media_mask=seen.mask,
            prompt_cache=self.cache,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Interruption(is_interrupted)]),
            **self.decoder.keywords | {"max_new_tokens": room},
        )
        new = output[0, len(asked.ids) :].tolist()
        found = self.decoder.read(new, room)
        if found["finish_reason"] == "stop_string" and is_interrupted():
            found["finish_reason"] = "interrupted"
        said = new[: found["new_tokens"] - (found["finish_reason"] == "stop_token")]
        self.conversation = asked.answer(said, found["text"], self.decoder.decode)
        self.seen = seen
        self.turns += 1
        counts = {"prompt_positions": positions, "reused_positions": self.cache.reused}
        return {"turn": self.turns, **found, **counts, "seconds": round(time.monotonic() - started, 3)}

    def _positions(self, asked: Conversation) -> int:
        """Count the positions of a conversation whose last turn has no answer yet.

        Raises:
            ContextError: if they leave no room for an answer, or if the vision tokenizer takes fewer images.
        """
        budget = self.decoder.budget
        num_media = asked.ids.count(self.model.config.media_token_id)
        if problem := budget.media_problem(num_media):
            raise ContextError(f"the conversation {problem} Start another one.")
        positions = budget.positions(len(asked.ids), [MediumSize()] * num_media)
        left = budget.left(positions)
        if left is not None and left < 1:
            raise ContextError(
                f"the conversation takes {positions} positions with this turn, but the language model has "
                f"{budget.context}. Start another one, or use fewer images; `vlm inspect --prompt` shows what each "
                "costs."
            )
        return positions

    def _see(self, images: Sequence[Any]) -> Seen:
        """All images so far; where one does not change the others' tokens, only new ones are encoded."""
        if not images:
            return self.seen
        transform = self.decoder.processor.image_processor.transform
        pixels = torch.stack([transform(image) for image in images])[None, :, None]  # [1, T_img, 1, C, H, W]
        apart = getattr(self.model.vision_tokenizer, "encodes_media_independently", False)
        if not apart and self.seen.pixels is not None:
            pixels = torch.cat([self.seen.pixels, pixels], dim=1)
        tokens, mask = self.model.encode_vision(pixels.to(self.model.device))
        if not apart:
            return Seen(pixels, tokens, mask)
        if self.seen.tokens is not None:
            tokens, mask = torch.cat([self.seen.tokens, tokens], dim=1), torch.cat([self.seen.mask, mask], dim=1)
        return Seen(None, tokens, mask)


class _Interruption(StoppingCriteria):
    """Ends an answer when it is asked to."""

    def __init__(self, is_interrupted: Callable[[], bool]) -> None:
        self.is_interrupted = is_interrupted

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.is_interrupted(), dtype=torch.bool, device=input_ids.device)
