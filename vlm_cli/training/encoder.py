"""From records to tokens: the same tokens that `vlm generate` feeds for the same text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from vlm_cli.composition import END_OF_CHUNK
from vlm_cli.data.records import Record, Segment
from vlm_cli.errors import LanguageModelError
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium, Slot, Text

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
        processor: the model's processor.
        end_id: the token that ends each target.
    """

    def __init__(self, processor: VLMProcessor, end_id: int) -> None:
        self.processor, self.end_id = processor, end_id
        self._media_id = processor.media_token_id
        # Many records ask the same question.
        self._encode_cached = lru_cache(maxsize=2**16)(self._encode_texts)

    def encode(self, record: Record) -> EncodedRecord:
        """Encode one record."""
        ids: list[int] = []
        is_target: list[bool] = []
        was_split = False
        pairs = zip(record.segments[::2], record.segments[1::2], strict=True)
        for number, (context, target) in enumerate(pairs):
            before, after, split = self._encode_pair(context, target, continues=number > 0)
            ids += [*before, *after, self.end_id]
            is_target += [False] * len(before) + [token != self._media_id for token in after] + [True]
            was_split |= split
        is_target[0] = False  # no token stands before it, from which the model could learn it
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
        if not continues:
            return self.processor.encode(parts)
        # The tokens after a media token are those after any special token.
        ids = self.processor.encode([Slot(), *parts])
        return ids[ids.index(self._media_id) + 1 :]
