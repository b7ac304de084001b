"""How a model answers any prompt: what `generate` is told, how long an answer may be, and what its tokens say."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from vlm_cli.decoding import decode_after
from vlm_cli.generation.stopping import StopStrings, cut_at_stop
from vlm_cli.modeling.budget import ContextBudget
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.printable import count_of
from vlm_cli.writing.plain import find_end_token
from vlm_cli.writing.writer import PromptWriter

if TYPE_CHECKING:
    from transformers import StoppingCriteriaList

    from vlm_cli.modeling.vlm import VLM
    from vlm_cli.processor import VLMProcessor
    from vlm_cli.tiling import MediumSize

__all__ = ["Answer", "GenerationPlan", "ignore_message"]

FinishReason = Literal["stop_token", "stop_string", "length", "interrupted"]


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and why it stopped.

    Attributes:
        text: without the stop string, if there was one.
        new_tokens: tokens that the model wrote, a stop token included.
        finish_reason: "length" if the answer used all the tokens that it might have.
    """

    text: str
    new_tokens: int
    finish_reason: FinishReason

    def to_dict(self) -> dict[str, Any]:
        """Return the keys that commands print and write."""
        return asdict(self)


def ignore_message(message: str) -> None:
    """Do nothing; the default where a caller may pass a function that tells the user something."""


class GenerationPlan:
    """The settings of one run of answers, the same for every prompt.

    Args:
        model: the VLM.
        processor: its processor.
        keywords: arguments of `VLM.generate`; `max_new_tokens` must be among them.
        stops: texts that end an answer.
        writer: turns prompts into tokens; None for prompts as they stand.

    Attributes:
        budget: how many positions and media the model can take.
    """

    def __init__(
        self,
        model: VLM,
        processor: VLMProcessor,
        keywords: Mapping[str, Any],
        stops: Sequence[str] = (),
        writer: PromptWriter | None = None,
    ) -> None:
        self.model, self.processor, self.stops = model, processor, list(stops)
        self.writer = writer or PromptWriter(processor)
        self.keywords = dict(keywords)
        self.max_new_tokens: int = self.keywords["max_new_tokens"]
        self.budget = ContextBudget.of(model)
        self._stop_ids = set(stop_token_ids(model.generation_config))

    @cached_property
    def end_id(self) -> int:
        """The token that ends each completion of a record, as a run learns it.

        Raises:
            LanguageModelError: if the model has none.
        """
        return find_end_token(self.model, self.processor)

    def room(
        self, positions: int, notify: Callable[[str], None] = ignore_message, media: Sequence[MediumSize] = ()
    ) -> int:
        """Return how many new tokens a prompt of so many positions may get: fewer where the context ends sooner.

        Args:
            positions: of the prompt, as `budget` counts them.
            notify: receives a note if the context allows fewer than `max_new_tokens`.
            media: the size of each medium of the prompt, for the message.

        Raises:
            PromptError: if the prompt alone is too long.
        """
        room = self.budget.room(positions, self.max_new_tokens, media)
        if room < self.max_new_tokens:
            notify(
                f"Note: the context of {self.budget.context} positions leaves room for {count_of(room, 'new token')}."
            )
        return room

    def stopping_criteria(self) -> StoppingCriteriaList:
        """Return what ends answers besides stop tokens and their length, for one call of `VLM.generate`."""
        from transformers import StoppingCriteriaList

        return StoppingCriteriaList([StopStrings(self.decode, self.stops)] if self.stops else [])

    def is_over(self, before: Sequence[int], ids: Sequence[int], newest: int) -> bool:
        """Say whether one of the last `newest` tokens of an answer ends it; its length, the caller knows.

        Args:
            before: the tokens of the prompt.
            ids: what the model wrote after them.
            newest: tokens that were not asked about before.
        """
        if any(token in self._stop_ids for token in ids[-newest:]):
            return True
        return bool(self.stops) and StopStrings(self.decode, self.stops).is_in_newest(before, ids, newest)

    def decode(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Turn new tokens into text, up to the first stop token and without special tokens.

        Args:
            before: the tokens of the prompt.
            ids: what the model wrote after them.
        """
        # The end of a line, for instance, may be a stop token without being a special token.
        return decode_after(self.processor.tokenizer, before, ids[: self._find_stop(ids)])

    def read(self, before: Sequence[int], ids: Sequence[int], room: int) -> Answer:
        """Turn new tokens into an answer.

        A stop token or a stop string ends the answer; padding may follow it.

        Args:
            before: the tokens of the prompt.
            ids: what the model wrote, with the padding of its row.
            room: how many tokens it might have written.
        """
        end = self._find_stop(ids)
        whole = self.decode(before, ids)
        text = cut_at_stop(whole, self.stops)
        if text != whole:
            lengths = range(1, len(ids) + 1)
            found = bisect_left(lengths, True, key=lambda n: self._has_stop_string(before, ids[:n]))
            return Answer(text, lengths[found], "stop_string")
        length = len(ids) if end is None else end + 1
        reason: FinishReason = "stop_token" if end is not None else "length" if length >= room else "interrupted"
        return Answer(text, length, reason)

    def _has_stop_string(self, before: Sequence[int], ids: Sequence[int]) -> bool:
        text = self.decode(before, ids)
        return cut_at_stop(text, self.stops) != text

    def _find_stop(self, ids: Sequence[int]) -> int | None:
        """Return the index of the first stop token; None without one."""
        return next((i for i, token in enumerate(ids) if token in self._stop_ids), None)
