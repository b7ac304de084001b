"""From records to tokens: the same tokens that `vlm generate` feeds for the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from vlm_cli.composition import END_OF_CHUNK, MEDIA_TOKEN
from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.records import Record, Segment
from vlm_cli.errors import LanguageModelError
from vlm_cli.modeling.stop_tokens import stop_token_ids
from vlm_cli.modeling.vlm import VLM
from vlm_cli.printable import count_of
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Medium, Slot, Text
from vlm_cli.templates.conversation import gap
from vlm_cli.writing.turns import Exchange, TurnsWriter
from vlm_cli.writing.writer import PromptWriter, plain_system

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
    """The tokens of a record, or of its turns up to one.

    Attributes:
        ids: the tokens.
        is_target: for each token, whether the model learns it.
        was_split: a token would have held the end of a context and the start of its target, and was split there.
        num_media: how many of the record's media stand among the tokens: the first ones.
    """

    ids: list[int]
    is_target: list[bool]
    was_split: bool
    num_media: int


def _spaced(record: Record) -> Record:
    """Put whitespace between the turns of a record that no template writes, as a chat without a template has it."""
    segments = list(record.segments[:1])
    for before, segment in pairwise(record.segments):
        ends = "".join(part.text if isinstance(part, Text) else MEDIA_TOKEN for part in before.parts)
        first = segment.parts[0] if segment.parts else None
        start = first.text if isinstance(first, Text) else ""
        apart = gap(ends, start, "assistant" if segment.is_target else "user")
        segments.append(replace(segment, parts=(Text(apart), *segment.parts)) if apart else segment)
    return replace(record, segments=tuple(segments))


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
        self._turns = None if writer.format is None else TurnsWriter(writer.format, end_id, stop_ids)
        self._media_id = self.processor.media_token_id
        self._num_written, self._num_repeated, self._num_plain_turns = 0, 0, 0  # records; see `notes`
        # Many records ask the same question.
        self._encode_cached = lru_cache(maxsize=2**16)(self._encode_texts)

    def encode(self, record: Record) -> list[EncodedRecord]:
        """Encode one record. It becomes several sequences where the chat template writes earlier turns in another way.

        Raises:
            RecordError: if the chat template cannot write the record.
            LanguageModelError: if the chat template fails.
        """
        is_turns = record.is_turns or record.system is not None
        if self._turns is not None and self.writer.uses_template(is_turns=is_turns):
            found = self._encode_turns(record, self._turns)
            self._num_written += 1
            self._num_repeated += len(found) > 1
        else:
            found = [self._encode_plain(_spaced(record) if record.is_turns else record)]
            self._num_plain_turns += is_turns
        for encoded in found:
            encoded.is_target[0] = False  # no token stands before it, from which the model could learn it
        return found

    @property
    def notes(self) -> list[str]:
        """What the user should know of how the records so far were written."""
        found = [] if self._turns is None else list(self._turns.notes)
        if self._num_written:
            found.insert(0, f"Template: the chat template writes {count_of(self._num_written, 'record')}.")
        if self._num_repeated:
            found.append(
                f"Note: the chat template writes earlier turns in another way once others follow, so that "
                f"{count_of(self._num_repeated, 'record')} of several turns became one sequence for each answer."
            )
        if self._num_plain_turns:
            why = "--chat-template none" if self.processor.chat_program else "the tokenizer has no chat template"
            found.append(
                f"Note: {count_of(self._num_plain_turns, 'record')} of turns are written plainly ({why}): each answer "
                "follows its turn after a space, and the next turn begins on a new line."
            )
        return found

    def _encode_turns(self, record: Record, writer: TurnsWriter) -> list[EncodedRecord]:
        """Encode a record with the chat template: contexts are the user's turns, and targets the answers to them."""
        turns = []
        for context, target in zip(record.segments[::2], record.segments[1::2], strict=True):
            texts = [part.text for part in target.parts if isinstance(part, Text)]
            if len(texts) < len(target.parts) or not context.parts:
                raise RecordError('is a "text", which has no turns. Give a "prompt" and its "completion".')
            turns.append(Exchange(context.parts, "".join(texts)))
        system = self.writer.system if record.system is None else record.system
        return [EncodedRecord(x.ids, x.is_target, False, x.num_media) for x in writer.write(turns, system)]

    def _encode_plain(self, record: Record) -> EncodedRecord:
        ids: list[int] = []
        is_target: list[bool] = []
        was_split = False
        pairs = zip(record.segments[::2], record.segments[1::2], strict=True)
        for number, (context, target) in enumerate(pairs):
            context = replace(context, parts=(*plain_system(record.system if not number else None), *context.parts))
            before, after, split = self._encode_pair(context, target, continues=number > 0)
            after = after if after[-1:] == [self.end_id] else [*after, self.end_id]
            ids += [*before, *after]
            is_target += [False] * len(before) + [token != self._media_id for token in after]
            was_split |= split
        return EncodedRecord(ids, is_target, was_split, len(record.sources))

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
