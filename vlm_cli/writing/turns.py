"""Write the turns of a record by the chat template, and say which tokens the model learns: its words, and their end.

With `■` for a token of an answer that the model learns, and `<|im_end|>` as the token that ends an answer:

    <|im_start|>user  Which?  <|im_end|>  <|im_start|>assistant  A  cat  <|im_end|>  <|im_start|>user  Sure? …
        no             no        no           no                 ■   ■       ■           no          no

Nobody knows a template's grammar, so nothing is searched in its text. `Conversation.ask` writes the turns up to an
answer, as it does for `vlm chat`, and what the template writes for that answer has to go on from there; a marker shows
where the words end. How a template writes an answer may depend on what follows: some drop reasoning of earlier turns,
or end the last answer with another token. Where the next turn does not go on from the answer as it was learned, the
record becomes several sequences: each begins with the turns as the template writes them now, and only new answers are
learned. So each answer stands behind the very tokens that `vlm chat` feeds at that turn. Where no template writes the
turns, a chat keeps no token that ends an answer, so each answer is a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vlm_cli.errors import LanguageModelError
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.conversation import AnswerEnd, ChatFormat, Conversation, Markers, Message, squash

__all__ = ["Exchange", "TurnsWriter", "WrittenTurns"]

SHOWN = 80  # characters of an answer that a message quotes


@dataclass(frozen=True)
class Exchange:
    """What the user says, and the answer to learn."""

    asks: tuple[Text | Medium, ...]
    answer: str


@dataclass
class WrittenTurns:
    """One sequence of tokens.

    Attributes:
        ids: the tokens.
        is_target: for each token, whether the model learns it.
        num_media: how many media stand in it: the first ones of the conversation.
    """

    ids: list[int] = field(default_factory=list)
    is_target: list[bool] = field(default_factory=list)
    num_media: int = 0

    def add(self, ids: Sequence[int], *, is_target: bool) -> None:
        self.ids += ids
        self.is_target += [is_target] * len(ids)


@dataclass(frozen=True)
class _Written:
    """How the template writes an answer, behind the turn that asks for it.

    Attributes:
        words: the answer, with what stands before it.
        closing: what follows.
    """

    words: str
    closing: str


class TurnsWriter:
    """Writes conversations as a chat with one model has them, to be learned.

    An answer has no whitespace at its ends, since the template, or the plain way of chats, says what stands around it.

    Args:
        format: how conversations are written.
        end_id: the token that ends an answer, where the template writes none.
        stop_ids: tokens that end an answer.

    Attributes:
        notes: what the user should know of the template, each once.
    """

    def __init__(self, format: ChatFormat, end_id: int, stop_ids: Sequence[int] = ()) -> None:
        self.format, self.end_id, self.stop_ids = format, end_id, {end_id, *stop_ids}
        self.notes: dict[str, None] = {}

    def write(self, turns: Sequence[Exchange], system: str | None = None) -> list[WrittenTurns]:
        """Write a conversation as sequences of tokens, each of which begins with the first turn.

        Args:
            turns: in their order.
            system: what the model is told before the first turn.

        Raises:
            LanguageModelError: if the template cannot write the conversation, or changes the words of an answer.
        """
        conversation = Conversation.begin(self.format, system)
        texts = (part.text for turn in turns for part in turn.asks if isinstance(part, Text))
        markers = Markers.absent_from(
            self.format.template or "", system or "", *texts, *(turn.answer for turn in turns)
        )
        found: list[WrittenTurns] = []
        so_far: list[int] = []  # tokens of the conversation: as in a chat, without what ends the last answer
        ends: list[int] = []  # of the last answer
        for turn in turns:
            asked = conversation.ask(turn.asks, markers)
            new = list(asked.ids[len(so_far) :])
            if found and list(asked.ids[: len(so_far)]) == so_far and new[: len(ends)] == ends:
                found[-1].add(new[len(ends) :], is_target=False)
            else:
                found.append(WrittenTurns())
                found[-1].add(asked.ids, is_target=False)
            text = turn.answer.strip()
            written = self._write_answer(asked, text)
            words = self.format.encode(written.words, markers, is_start=False)
            ends = self._find_end(self.format.encode(written.closing, markers, is_start=False))
            found[-1].add([*words, *ends], is_target=True)
            found[-1].num_media = len(asked.media)
            so_far = [*asked.ids, *words]
            conversation = replace(
                asked,
                messages=(*asked.messages, Message("assistant", (Text(text),))),
                ids=tuple(so_far),
                rendered=asked.rendered + written.words,
            )
        return found

    def _write_answer(self, asked: Conversation, text: str) -> _Written:
        """Return how the template writes an answer.

        Some templates write something before the last answer of a conversation, such as an empty block of reasoning,
        that they leave out once another turn follows. The model then learns the answer without it, as a chat goes on.

        Raises:
            LanguageModelError: if the template does not write the answer's words behind the turn that asks for it.
        """
        message = Message("assistant", (Text(text), AnswerEnd()))
        wanted = squash(self.format.insert_markers(Message("assistant", (Text(text),)), asked.markers))
        as_last = self._find_answer((*asked.messages, message), asked, opens_answer=False)
        if as_last is not None and squash(as_last.words) == wanted:
            return as_last
        as_earlier = None
        try:
            as_earlier = self._find_answer(
                (*asked.messages, message, Message("user", (Text("Go on."),))), asked, opens_answer=True
            )
        except LanguageModelError:
            if as_last is None:
                raise
        if as_earlier is not None and squash(as_earlier.words) == wanted:
            return as_earlier
        if as_last is None:
            opens = asked.rendered[-SHOWN:]
            raise LanguageModelError(
                f"the chat template does not write an answer where it lets the model begin one, behind {opens!r}. "
                "Give another template: --chat-template FILE."
            )
        if wanted and squash(as_last.words).endswith(wanted):
            before = as_last.words[: -len(text)] if as_last.words.endswith(text) else as_last.words[:SHOWN]
            self.notes[f"Note: the chat template begins answers with {before!r}, which the model learns to write."] = (
                None
            )
            return as_last
        raise LanguageModelError(
            f"the chat template changes the words of an answer: {text[:SHOWN]!r} becomes {as_last.words[:SHOWN]!r}. "
            "Give another template: --chat-template FILE."
        )

    def _find_answer(self, messages: Sequence[Message], asked: Conversation, *, opens_answer: bool) -> _Written | None:
        """Return the answer that the marker ends; None if it does not follow the turns that ask for it."""
        rendered = self.format.render(messages, asked.markers, opens_answer=opens_answer)
        if not rendered.startswith(asked.rendered):
            return None
        words, marker, closing = rendered[len(asked.rendered) :].partition(asked.markers.answer_end)
        return _Written(words, closing) if marker and asked.markers.answer_end not in closing else None

    def _find_end(self, closing: Sequence[int]) -> list[int]:
        """Return what the template writes behind an answer, up to the first token that stops the model."""
        stop = next((i for i, token in enumerate(closing) if token in self.stop_ids), None)
        if stop is not None:
            return list(closing[: stop + 1])
        if self.format.template is None:
            return [self.end_id]
        end = self.format.tokenizer.convert_ids_to_tokens(self.end_id)
        self.notes[
            f"Note: the chat template ends answers with no token that stops the model, so the model learns {end} there."
        ] = None
        return [self.end_id]
