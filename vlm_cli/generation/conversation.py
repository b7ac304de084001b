"""A conversation as token ids: what was read and written stays as it is, and each turn adds to it.

    with a chat template       <|im_start|>user\\n<image>What is it?<|im_end|>\\n<|im_start|>assistant\\n
    without                    <image>What is it? A cat.\\nWhat colour is it?

A template gets what was said with two marks in it, characters that nobody wrote: one where an image is, and one that
cuts in two what spells a special token. So the template sees whole texts, which it may trim or search, and all that it
writes is read at once, as in training; yet nothing that was said becomes a special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from vlm_cli.errors import LanguageModelError, first_line
from vlm_cli.processor import Seam, VLMProcessor
from vlm_cli.prompt import Medium, Text

__all__ = ["Conversation", "Message", "Script"]


@dataclass(frozen=True)
class Message:
    """What one side said."""

    role: str  # user or assistant
    parts: tuple[Text | Medium, ...]


@dataclass(frozen=True)
class Marks:
    """A character for each image, and one that cuts a text."""

    image: str
    seam: str

    @classmethod
    def absent_from(cls, *texts: str) -> Marks:
        taken = set(chain(*texts))
        return cls(*islice((c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in taken), 2))  # for private use


class Script:
    """How a model's conversations are written.

    Args:
        processor: of the model.
        parse_special_tokens: read the special tokens that the user spells as the tokens.
    """

    def __init__(self, processor: VLMProcessor, *, parse_special_tokens: bool = False) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.parse_special_tokens = parse_special_tokens
        self.template = _chat_template(processor)
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        spellings = "|".join(map(re.escape, sorted(special))) or "(?!)"
        self._special = re.compile(f"(?=(?:{spellings}))(.)", re.DOTALL)
        self._takes_parts = self.template is not None and not self._takes_text()

    def spell(self, messages: Sequence[Message], marks: Marks) -> str:
        """All messages as one text with marks, up to where the model's answer begins.

        Raises:
            LanguageModelError: if the template cannot write these messages, or leaves an image out.
        """
        if self.template is None:
            # An answer stands behind what it answers, and the next turn on a line of its own.
            breaks = [k > 0 and message.role == "user" for k, message in enumerate(messages)]
            return "".join("\n" * b + self.mark(m, marks) for b, m in zip(breaks, messages, strict=True))
        said = [self.mark(message, marks) for message in messages]
        found = self._render([(m.role, text) for m, text in zip(messages, said, strict=True)])
        if (written := found.count(marks.image)) != (given := sum(text.count(marks.image) for text in said)):
            raise LanguageModelError(
                f"the tokenizer's chat template writes {written} of the conversation's {given} images. Start another "
                "conversation, or change the chat_template of the model's directory."
            )
        return found

    def mark(self, message: Message, marks: Marks) -> str:
        """What was said, with marks."""
        cuts = self.template is not None and not (message.role == "user" and self.parse_special_tokens)
        return "".join(
            marks.image if isinstance(part, Medium) else self._cut(part.text, marks.seam) if cuts else part.text
            for part in message.parts
        )

    def encode(self, spelled: str, marks: Marks, *, is_start: bool) -> list[int]:
        """Token ids of a text with marks: the start of a conversation, or what follows."""
        kinds = {marks.image: Medium(""), marks.seam: Seam()}
        pieces = re.split(f"([{marks.image}{marks.seam}])", spelled)
        parts: list[Any] = [kinds.get(piece) or Text(piece) for piece in pieces if piece]
        return self.processor.encode(
            parts if is_start else [Seam(), *parts],  # the middle of a text is not read as its beginning
            parse_special_tokens=self.template is not None or self.parse_special_tokens,
            add_special_tokens=is_start and self.template is None,  # a template writes its own
        )

    def _cut(self, text: str, seam: str) -> str:
        return self._special.sub(rf"\g<1>{seam}", text)

    def _render(self, said: Sequence[tuple[str, str]]) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._takes_parts else text}
            for role, text in said
        ]
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise LanguageModelError(
                f"the tokenizer's chat template cannot write this conversation: {type(error).__name__}: "
                f"{first_line(error)}."
            ) from None

    def _takes_text(self) -> bool:
        """Whether the template takes what was said as a text; some want a list of parts."""
        self._takes_parts = False
        try:
            return "hello" in self._render([("user", "hello")])
        except LanguageModelError:
            return False


def _chat_template(processor: VLMProcessor) -> str | None:
    found = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


@dataclass(frozen=True)
class Conversation:
    """What was said so far; a turn makes another of it.

    Attributes:
        script: how it is written.
        messages: in their order.
        ids: what the model has read and written.
        spelled: the text of these, with marks.
        marks: that stand in it.
    """

    script: Script
    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()
    spelled: str = ""
    marks: Marks = Marks("", "")

    def ask(self, parts: Sequence[Text | Medium]) -> Conversation:
        """With a turn of the user, up to where the answer begins.

        Ids stay as they are, so that what a model wrote is what it reads. Only where the template writes what came
        before in another way than the model did, all of it is encoded anew.
        """
        messages = (*self.messages, Message("user", tuple(parts)))
        texts = [part.text for message in messages for part in message.parts if isinstance(part, Text)]
        marks = Marks.absent_from(self.script.template or "", *texts)
        spelled = self.script.spell(messages, marks)
        goes_on = bool(self.messages) and spelled.startswith(self.spelled)
        new = spelled[len(self.spelled) :] if goes_on else spelled
        ids = self.script.encode(new, marks, is_start=not goes_on)
        return Conversation(self.script, messages, (*(self.ids if goes_on else ()), *ids), spelled, marks)

    def answer(self, ids: Sequence[int], text: str, decode: Any) -> Conversation:
        """With an answer.

        Args:
            ids: that the model wrote, without a stop token.
            text: that was shown of it; a stop string may have cut it.
            decode: token ids to text.
        """
        kept = len(ids)
        while not text.startswith(decode(list(ids[:kept]))):
            kept -= 1
        shown = self.script.mark(Message("assistant", (Text(decode(list(ids[:kept]))),)), self.marks)
        return replace(
            self,
            messages=(*self.messages, Message("assistant", (Text(text),))),
            ids=(*self.ids, *ids[:kept]),
            spelled=self.spelled + shown,
        )
