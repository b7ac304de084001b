"""From records to tokens: the same tokens that `vlm generate` feeds for the same text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from vlm_cli.data.jsonl import RecordError
from vlm_cli.data.records import Record
from vlm_cli.printable import count_of
from vlm_cli.prompt import Text
from vlm_cli.writing.plain import PlainWriter
from vlm_cli.writing.turns import Exchange, TurnsWriter
from vlm_cli.writing.writer import PromptWriter, plain_system

__all__ = ["EncodedRecord", "RecordEncoder"]


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
        self.writer, self.processor = writer, writer.processor
        self._end_id, self._stop_ids = end_id, stop_ids
        self._num_written, self._num_repeated = 0, 0  # records that the template writes; see `notes`
        self._num_plain_turns, self._num_plain_repeated = 0, 0
        self._plain = PlainWriter(self.processor, end_id, parse_special_tokens=writer.parse_special_tokens)

    @cached_property
    def _turns(self) -> TurnsWriter:
        return TurnsWriter(self.writer.turn_format, self._end_id, self._stop_ids)

    def encode(self, record: Record) -> list[EncodedRecord]:
        """Encode one record.

        It becomes several sequences where a chat reads an answer otherwise than it is learned: the template writes
        earlier turns in another way, or no template writes the token that ends an answer.

        Raises:
            RecordError: if the chat template cannot write the record.
            LanguageModelError: if the chat template fails.
        """
        if self.writer.uses_template(is_turns=record.is_turns or record.system is not None):
            found = self._encode_turns(record)
            self._num_written += 1
            self._num_repeated += len(found) > 1
        elif record.is_turns:
            found = self._encode_turns(record)
            self._num_plain_turns += 1
            self._num_plain_repeated += len(found) > 1
        else:
            found = [self._encode_plain(record)]
        for encoded in found:
            encoded.is_target[0] = False  # no token stands before it, from which the model could learn it
        return found

    @property
    def notes(self) -> list[str]:
        """What the user should know of how the records so far were written."""
        found = list(self._turns.notes) if self._num_written or self._num_plain_turns else []
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
        if self._num_plain_repeated:
            found.append(
                f"Note: {count_of(self._num_plain_repeated, 'record')} of several turns became one sequence for each "
                "answer, since a chat without a template keeps no token that ends earlier answers. With a template "
                "(--chat-template FILE), a record is learned at once."
            )
        return found

    def _encode_turns(self, record: Record) -> list[EncodedRecord]:
        """Encode a record as a chat: contexts are the user's turns, and targets the answers to them."""
        turns = []
        for context, target in zip(record.segments[::2], record.segments[1::2], strict=True):
            texts = [part.text for part in target.parts if isinstance(part, Text)]
            if len(texts) < len(target.parts) or not context.parts:
                raise RecordError('is a "text", which has no turns. Give a "prompt" and its "completion".')
            turns.append(Exchange(context.parts, "".join(texts)))
        system = self.writer.system if record.system is None else record.system
        return [EncodedRecord(x.ids, x.is_target, False, x.num_media) for x in self._turns.write(turns, system)]

    def _encode_plain(self, record: Record) -> EncodedRecord:
        written = self._plain.write(record.segments, plain_system(record.system))
        return EncodedRecord(written.ids, written.is_target, written.was_split, len(record.sources))
