"""From records to tokens: the same tokens that `vlm generate` feeds for the same text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from vlm_cli.composition import END_OF_CHUNK
from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.records import Record, Segment
from vlm_cli.decoding import decode_after
from vlm_cli.errors import LanguageModelError
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import TokenBreak, VLMProcessor
from vlm_cli.prompt import Medium, Slot, Text
from vlm_cli.writing.conversation import Conversation
from vlm_cli.writing.writer import PromptWriter

__all__ = ["EncodedRecord", "RecordEncoder", "find_end_token"]


def find_end_token(model: VLM, processor: VLMProcessor) -> int:
    """Return the id of the token that ends each target: `<|endofchunk|>` if the composition has it, else end-of-text.

    Raises:
        LanguageModelError: if the model has neither.
    """
    if END_OF_CHUNK in model.config.composition.added_tokens:
        return int(processor.tokenizer.convert_tokens_to_ids(END_OF_CHUNK))
    found = stop_token_ids(processor.tokenizer, model.config)
    if not found:
        raise LanguageModelError(
            f"the model has no token that ends an answer: neither {END_OF_CHUNK} nor an end-of-text token. Build it "
            f"again with --set 'added_tokens=[{END_OF_CHUNK!r}, <image>]'."
        )
    return found[0]


class EncodedRecord(NamedTuple):
    """The tokens of a record.

    Attributes:
        ids: the tokens.
        is_target: for each token, whether the model learns it.
        was_split: a token would have held the end of a context and the start of its target, and was split there.
    """

    ids: list[int]
    is_target: list[bool]
    was_split: bool


class RecordEncoder:
    """Encode records for one model.

    With `I` for the media token and `E` for the end token:

        prompt "<image:a.png>Q: How many? A:", completion " Two."

        ids          I   Q  :  How many ?  A  :   Two  .   E
        is_target    no  no no no  no   no no no  yes  yes yes

    Args:
        writer: turns prompts into tokens.
        end_id: the token that ends each target, where the chat template writes none.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, writer: PromptWriter, end_id: int, stop_ids: Sequence[int] = ()) -> None:
        self.writer, self.processor, self.end_id = writer, writer.processor, end_id
        self.stop_ids = {end_id, *stop_ids}
        self._media_id = self.processor.media_token_id
        # Many records ask the same question.
        self._encode_cached = lru_cache(maxsize=2**16)(self._encode_texts)

    def encode(self, record: Record) -> EncodedRecord:
        """Encode one record.

        Raises:
            RecordError: if the chat template cannot write the record.
            LanguageModelError: if the chat template fails.
        """
        encoded = self._encode_plain(record) if self.writer.format is None else self._encode_turns(record)
        encoded.is_target[0] = False  # no token stands before it, from which the model could learn it
        return encoded

    def _encode_turns(self, record: Record) -> EncodedRecord:
        """Encode a record with the chat template: contexts are the user's turns, and targets the answers to them.

        An answer has no whitespace at its ends, since the template says what stands around it.
        """
        assert self.writer.format is not None
        conversation = Conversation(self.writer.format)
        ids: list[int] = []
        is_target: list[bool] = []
        ends: list[int] = []
        for context, target in zip(record.segments[::2], record.segments[1::2], strict=True):
            if not all(isinstance(part, Text) for part in target.parts) or not context.parts:
                raise RecordError('is a "text", which has no turns. Give a "prompt" and its "completion".')
            asked = conversation.ask(context.parts)
            if list(asked.ids[: len(conversation.ids)]) != list(conversation.ids):
                raise RecordError("the chat template writes earlier turns in another way. Give each turn as a record.")
            new = list(asked.ids[len(conversation.ids) :])
            follows = bool(ends) and new[: len(ends)] == ends  # the template ended the answer before this turn
            ids += new
            is_target += [follows and i < len(ends) for i in range(len(new))]
            text = "".join(part.text for part in target.parts if isinstance(part, Text)).strip()
            answer = self.processor.encode([TokenBreak(), Text(text)], add_special_tokens=False)
            ends = self._end_of(asked.close(text))
            ids += answer
            is_target += [True] * len(answer)
            conversation = asked.answer(answer, text, partial(decode_after, self.processor.tokenizer, asked.ids))
        ids += ends
        is_target += [True] * len(ends)
        return EncodedRecord(ids, is_target, False)

    def _end_of(self, closing: Sequence[int]) -> list[int]:
        """Return what the template writes behind an answer, up to the first token that stops the model."""
        stop = next((i for i, token in enumerate(closing) if token in self.stop_ids), None)
        return [self.end_id] if stop is None else list(closing[: stop + 1])

    def _encode_plain(self, record: Record) -> EncodedRecord:
        ids: list[int] = []
        is_target: list[bool] = []
        was_split = False
        pairs = zip(record.segments[::2], record.segments[1::2], strict=True)
        for number, (context, target) in enumerate(pairs):
            before, after, split = self._encode_pair(context, target, continues=number > 0)
            after = after if after[-1:] == [self.end_id] else [*after, self.end_id]
            ids += [*before, *after]
            is_target += [False] * len(before) + [token != self._media_id for token in after]
            was_split |= split
        return EncodedRecord(ids, is_target, was_split)

    def _encode_pair(self, context: Segment, target: Segment, *, continues: bool) -> tuple[list[int], list[int], bool]:
        """Encode a context and its target; tell whether a token that both would share was split."""
        before = self._encode_parts(context.parts, continues)
        both = self._encode_parts([*context.parts, *target.parts], continues)
        if both[: len(before)] == before:
            return before, both[len(before) :], False
        # At inference the prompt ends where the context ends, so its last token must end there in training too.
        return before, self._encode_parts(target.parts, True), True

    def _encode_parts(self, parts: Sequence[Text | Medium], continues: bool) -> list[int]:
        """Encode the start of a prompt or, if it `continues`, the text after a special token."""
        key = tuple(part.text if isinstance(part, Text) else None for part in parts)
        return self._encode_cached(key, continues)

    def _encode_texts(self, texts: tuple[str | None, ...], continues: bool) -> list[int]:
        """Encode texts, with None for each medium."""
        parts = [Slot() if text is None else Text(text) for text in texts]
        special = self.writer.parse_special_tokens
        if not continues:
            return self.processor.encode(parts, parse_special_tokens=special)
        # The tokens after a media token are those after any special token.
        ids = self.processor.encode([Slot(), *parts], parse_special_tokens=special)
        return ids[ids.index(self._media_id) + 1 :]
