"""What a model is asked for, and what its tokens say: a text, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Decoder", "cut_at_stop"]


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string.

    >>> cut_at_stop("a cat. END more", [" END"])
    'a cat.'
    """
    found = [i for i in (text.find(stop) for stop in stops) if i >= 0]
    return text[: min(found)] if found else text


class Decoder:
    """How a model continues any prompt.

    Args:
        model: the VLM.
        processor: its processor.
        keywords: of `generate`.
        stops: texts that end an answer.
    """

    def __init__(self, model: Any, processor: Any, keywords: Mapping[str, Any], stops: Sequence[str] = ()) -> None:
        from vlm_cli.modeling.budget import ContextBudget
        from vlm_cli.modeling.stop_tokens import stop_token_ids

        self.model, self.processor, self.stops = model, processor, list(stops)
        self.keywords = dict(keywords)
        if self.stops:
            self.keywords |= {"stop_strings": self.stops, "tokenizer": processor.tokenizer}
        self.max_new_tokens: int = self.keywords["max_new_tokens"]
        self.budget = ContextBudget.of(model)
        self._ends = set(stop_token_ids(model.generation_config))

    def room(self, positions: int, notify: Callable[[str], None] = lambda message: None) -> int:
        """Return how many new tokens a prompt of so many positions may get: fewer where the context ends sooner.

        Args:
            positions: of the prompt, as `budget` counts them.
            notify: receives a note if the context allows fewer than `max_new_tokens`.

        Raises:
            PromptError: if the prompt alone is too long.
        """
        room = self.budget.room(positions, self.max_new_tokens)
        if room < self.max_new_tokens:
            notify(f"Note: the context of {self.budget.context} positions leaves room for {room} new tokens.")
        return room

    def decode(self, ids: list[int]) -> str:
        # Clean-up would take back spaces that were written already.
        return self.processor.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def read(self, ids: list[int], room: int) -> dict[str, Any]:
        """What new tokens say, of which there could be `room`."""
        end = next((i for i, token in enumerate(ids) if token in self._ends), None)
        length = len(ids) if end is None else end + 1
        if end is None and self.stops:
            # Answers that a stop string ended sooner than others are padded.
            while length and ids[length - 1] == self.model.config.pad_token_id:
                length -= 1
        whole = self.decode(ids[:length])
        text = cut_at_stop(whole, self.stops)
        cut = text != whole or (end is None and length < room)
        reason = "stop_string" if cut else "stop_token" if end is not None else "length"
        return {"text": text, "new_tokens": length, "finish_reason": reason}
