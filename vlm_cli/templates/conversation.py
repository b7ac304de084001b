"""A conversation as token ids: what the model has read and written stays as it is, and each turn adds to it.

    with a chat template       <|im_start|>user\\n<image>What is it?<|im_end|>\\n<|im_start|>assistant\\n
    without                    <image>What is it? A cat.\\nWhat colour is it?

A chat template is a program that formats texts; it knows neither images nor the difference between a special token and
text that spells one. So it receives texts with two marker characters that occur in no text of the conversation: one
stands for an image, and one cuts the spelling of a special token in two. With `▣` and `¦` for the markers, the user's

    [image] Is </s> a tag?      reaches the template as     ▣ Is <¦/s> a tag?

(A template that writes `<image>` for an image itself gets the image, and `▣` takes the place of what it writes.)

The template formats that, and the tokenizer then reads the whole result at once, as in training: `▣` becomes the media
token, and `¦` becomes nothing but keeps `<` and `/s>` apart. Special tokens come from the template alone. A third
marker stands at the end of an answer that is learned, to tell its words from what the template writes behind them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any, Literal, Protocol

from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import ChatTemplateError, EndlessTemplateError, LanguageModelError
from vlm_cli.printable import count_of
from vlm_cli.prompt import Medium, Text, TokenBreak
from vlm_cli.templates.pictures import takes_text, writes_images
from vlm_cli.templates.render import render_template

__all__ = ["AnswerEnd", "ChatFormat", "Conversation", "Encoder", "Markers", "Message", "gap", "squash"]

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points that Unicode leaves to programs


class Encoder(Protocol):
    """What a conversation needs of a processor."""

    tokenizer: Any
    image_processor: Any

    @property
    def chat_program(self) -> str | None:
        """The chat template; None if there is none."""

    def encode(
        self, parts: Sequence[Any], *, parse_special_tokens: bool = False, add_special_tokens: bool = True
    ) -> list[int]:
        """Return the tokens of a prompt."""


@dataclass(frozen=True)
class AnswerEnd:
    """The end of an answer, which a marker shows."""


@dataclass(frozen=True)
class Message:
    """What the user or the model said, or what the model is told before the first turn."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Text | Medium | AnswerEnd, ...]

    @property
    def texts(self) -> list[str]:
        return [part.text for part in self.parts if isinstance(part, Text)]


@dataclass(frozen=True)
class Markers:
    """Three characters that occur in no text of a conversation.

    Attributes:
        image: stands for an image.
        token_break: cuts the spelling of a special token, so that the tokenizer reads it as text.
        answer_end: stands at the end of an answer.
    """

    image: str
    token_break: str
    answer_end: str

    @classmethod
    def absent_from(cls, *texts: str) -> Markers:
        """Choose three characters that none of the texts has."""
        taken = set(chain(*texts))
        return cls(*islice((c for c in map(chr, PRIVATE_USE) if c not in taken), 3))


class ChatFormat:
    """How a model's conversations are written as text, and read as tokens.

    Args:
        processor: of the model.
        template: in the place of the processor's own.
        plain: write turns as lines, even if there is a template.
        parse_special_tokens: read the spelling of a special token in the user's text as that token.
        gives_images: give images to a template that writes `<image>` for them; llama.cpp gives every template texts.

    Attributes:
        template: the chat template, a Jinja program; None if the tokenizer has none.
    """

    def __init__(
        self,
        processor: Encoder,
        template: str | None = None,
        *,
        plain: bool = False,
        parse_special_tokens: bool = False,
        gives_images: bool = True,
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.parse_special_tokens, self.gives_images = parse_special_tokens, gives_images
        self.template = None if plain else template or processor.chat_program
        special = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        spellings = "|".join(map(re.escape, sorted(special))) or "(?!)"
        # The first character of each spelling, so that the marker can be put behind it.
        self._special = re.compile(f"(?=(?:{spellings}))(.)", re.DOTALL)
        self._media = re.compile(f"(?={re.escape(MEDIA_TOKEN)})(.)")

    def render(self, messages: Sequence[Message], markers: Markers, *, opens_answer: bool = True) -> str:
        """Write all messages as one text with markers.

        Args:
            messages: in their order.
            markers: that stand in the text.
            opens_answer: go on to where the model's answer begins; the last message is then the user's.

        Raises:
            ChatTemplateError: if the template cannot write these messages, or leaves an image or the system text out.
        """
        if self.template is None:
            rendered = ""
            for message in messages:
                rendered = self.append(rendered, message, markers)
            return rendered
        texts = [self.insert_markers(message, markers) for message in messages]
        pairs = [(m.role, text) for m, text in zip(messages, texts, strict=True)]
        apply = self._apply_system if pairs[0][0] == "system" else self._apply
        found = apply(pairs, markers.image, opens_answer)
        if (written := found.count(markers.image)) != (given := sum(text.count(markers.image) for text in texts)):
            raise ChatTemplateError(
                f"the tokenizer's chat template writes {written} of {count_of(given, 'image')} of the conversation. "
                "Start another "
                "conversation, or change the chat_template of the model's directory."
            )
        return found

    def append(self, rendered: str, message: Message, markers: Markers) -> str:
        """Write a message behind others; a template has written what stands between them."""
        text = self.insert_markers(message, markers)
        apart = "" if self.template is not None or not rendered else gap(rendered, text, message.role)
        return f"{rendered}{apart}{text}"

    def insert_markers(self, message: Message, markers: Markers) -> str:
        """Write a message as text, with a marker for each image and in each spelling of a special token."""
        breaks = self.template is not None and not (message.role != "assistant" and self.parse_special_tokens)
        patterns = [*([self._special] if breaks else []), *([self._media] if self._writes_images else [])]

        def write(part: Text | Medium | AnswerEnd) -> str:
            if not isinstance(part, Text):
                return markers.image if isinstance(part, Medium) else markers.answer_end
            text = part.text
            for pattern in patterns:
                text = pattern.sub(rf"\g<1>{markers.token_break}", text)
            return text

        return "".join(map(write, message.parts))

    def encode(self, rendered: str, markers: Markers, *, is_start: bool) -> list[int]:
        """Turn a text with markers into token ids: the start of a conversation, or what follows."""
        kinds: dict[str, Text | Medium | TokenBreak] = {markers.image: Medium(""), markers.token_break: TokenBreak()}
        pieces = re.split(f"([{markers.image}{markers.token_break}])", rendered)
        parts: list[Text | Medium | TokenBreak] = [kinds.get(piece) or Text(piece) for piece in pieces if piece]
        return self.processor.encode(
            parts if is_start else [TokenBreak(), *parts],  # tokenizers read the start of a text in another way
            parse_special_tokens=self.template is not None or self.parse_special_tokens,
            add_special_tokens=is_start and self.template is None,  # a template writes its own
        )

    def encode_messages(
        self, messages: Sequence[Message], *, opens_answer: bool = True, begun: Message | None = None
    ) -> list[int]:
        """Return the tokens of messages.

        Args:
            messages: in their order.
            opens_answer: go on to where the answer to the last of them begins.
            begun: the beginning of that answer, for the model to go on with.

        Raises:
            ChatTemplateError: if the template cannot write these messages.
        """
        texts = (text for message in (*messages, *([begun] if begun else [])) for text in message.texts)
        markers = Markers.absent_from(self.template or "", *texts)
        rendered = self._render_with_breaks(messages, markers, opens_answer=opens_answer or begun is not None)
        return self.encode(rendered + (self.insert_markers(begun, markers) if begun else ""), markers, is_start=True)

    def _render_with_breaks(self, messages: Sequence[Message], markers: Markers, *, opens_answer: bool) -> str:
        """Write all messages, with a break around each earlier answer where a chat has one: its tokens stand alone."""
        rendered = self.render(messages, markers, opens_answer=opens_answer)
        answers = [i for i, message in enumerate(messages[:-1]) if message.role == "assistant"]
        if not answers:
            return rendered
        ended = [replace(m, parts=(*m.parts, AnswerEnd())) if i in answers else m for i, m in enumerate(messages)]
        *said, rest = self.render(ended, markers, opens_answer=opens_answer).split(markers.answer_end)
        asked = [self.insert_markers(messages[i - 1], markers) if i else "" for i in answers]
        # Without a template, the model writes the space before its answer.
        words = [self.append(x, messages[i], markers)[len(x) :] for x, i in zip(asked, answers, strict=True)]
        opened = self.render(messages[: answers[0]], markers)
        if (
            len(said) != len(words)
            or "".join([*said, rest]) != rendered
            or not all(map(str.endswith, said, words))
            or said[0] != opened + words[0]
        ):
            return rendered  # a chat writes all of it anew, too
        cut = markers.token_break
        return "".join(f"{x.removesuffix(y)}{cut}{y}{cut}" for x, y in zip(said, words, strict=True)) + rest

    def _apply_system(self, messages: Sequence[tuple[str, str]], image: str, opens_answer: bool) -> str:
        """Write messages that begin with the system text.

        Raises:
            ChatTemplateError: if the template has no place for that text; many refuse it, and some forget it.
        """
        advice = "Leave the system text out, or write it at the start of the user's first turn."
        try:
            found = self._apply(messages, image, opens_answer)
        except EndlessTemplateError:
            raise
        except LanguageModelError as error:
            self._apply(messages[1:], image, opens_answer)  # if that fails too, the system text is not to blame
            raise ChatTemplateError(f"the tokenizer's chat template takes no system text ({error}) {advice}") from None
        if squash(messages[0][1]) not in squash(found):
            raise ChatTemplateError(f"the tokenizer's chat template leaves out the system text. {advice}")
        return found

    def _apply(self, messages: Sequence[tuple[str, str]], image: str, opens_answer: bool) -> str:
        return self._apply_template(messages, image, opens_answer) + (self.heading if opens_answer else "")

    def _apply_template(self, messages: Sequence[tuple[str, str]], image: str, opens_answer: bool) -> str:
        """Let the template write messages with a marker for each image."""
        assert self.template is not None
        conversation = [{"role": role, "content": self._make_content(text, image)} for role, text in messages]
        tokens = self.tokenizer.special_tokens_map
        found = render_template(self.template, conversation, tokens, opens_answer=opens_answer)
        return found.replace(MEDIA_TOKEN, image) if self._writes_images else found

    def _make_content(self, text: str, image: str) -> str | list[dict[str, str]]:
        """Return the content of a message as the template wants it."""
        if self._writes_images:
            pieces = re.split(f"({image})", text)
            return [{"type": "image"} if x == image else {"type": "text", "text": x} for x in pieces if x] or [
                {"type": "text", "text": ""}
            ]
        return [{"type": "text", "text": text}] if self._takes_parts else text

    @cached_property
    def _writes_images(self) -> bool:
        """Whether the template itself writes `<image>` for an image: it may write more around it, such as a newline."""
        if self.template is None or not self.gives_images:
            return False
        return writes_images(self.template, self.tokenizer.special_tokens_map)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template wants the content of a message as parts. It runs only where something is written."""
        return self.template is not None and not takes_text(self.template, self.tokenizer.special_tokens_map)

    @cached_property
    def heading(self) -> str:
        """What a template that knows no `add_generation_prompt` writes before each answer, such as `Assistant: `.

        Else the model would have to write it at the start of each answer. Whitespace is left to the model.
        """
        if self.template is None:
            return ""
        said = [("user", "hello")]
        try:
            opened, closed = (self._apply_template(said, MEDIA_TOKEN, opens) for opens in (True, False))
            whole = self._apply_template([*said, ("assistant", "world")], MEDIA_TOKEN, False)
        except EndlessTemplateError:
            raise
        except LanguageModelError:  # whoever renders a conversation is told
            return ""
        if opened != closed or not whole.startswith(opened):
            return ""
        heading, found, _ = whole[len(opened) :].partition("world")
        return heading.rstrip(" ") if found and heading.strip() else ""


def gap(before: str, text: str, role: str) -> str:
    """Return what stands before a message that no template writes: an answer follows its turn after whitespace.

    >>> gap("What is it?", "A cat.", "assistant"), gap("A cat.", "Sure?", "user")
    (' ', '\\n')

    Args:
        before: what was said before it.
        text: of the message.
        role: who says it.
    """
    if role != "assistant":
        return "\n"
    return "" if before[-1:].isspace() or text[:1].isspace() else " "


def squash(text: str) -> str:
    """Return a text without its whitespace, which templates change as they like."""
    return "".join(text.split())


@dataclass(frozen=True)
class Conversation:
    """The messages so far, as text and as tokens; a turn makes another conversation of them.

    Attributes:
        format: how messages are written.
        messages: in their order.
        ids: tokens that the model has read and written.
        rendered: the text of these tokens, with markers.
        markers: that stand in the text.
    """

    format: ChatFormat
    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()
    rendered: str = ""
    markers: Markers = Markers("", "", "")

    @property
    def media(self) -> list[Medium]:
        """All images, in reading order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, Medium)]

    @classmethod
    def begin(cls, format: ChatFormat, system: str | None = None) -> Conversation:
        """Begin a conversation in which nobody has spoken; `system` is what the model is told before the first turn."""
        return cls(format, () if system is None else (Message("system", (Text(system),)),))

    def ask(self, parts: Sequence[Text | Medium], markers: Markers | None = None) -> Conversation:
        """Add a turn of the user, up to where the answer begins.

        The ids of earlier turns stay as they are, so that the model reads the very tokens that it wrote. Only where the
        template writes earlier messages in another way now, the whole conversation is encoded again.

        Args:
            parts: of the turn.
            markers: that no text of the conversation has, if the caller knows texts that are still to come.

        Raises:
            ChatTemplateError: if the template cannot write the conversation.
        """
        asked = Message("user", tuple(parts))
        texts = (text for message in (*self.messages, asked) for text in message.texts)
        markers = markers or Markers.absent_from(self.format.template or "", *texts)
        for said in self._spellings():
            messages = (*said, asked)
            rendered = self.format.render(messages, markers)
            if continues := bool(self.ids) and rendered.startswith(self.rendered):
                break
        new = rendered[len(self.rendered) :] if continues else rendered
        ids = self.format.encode(new, markers, is_start=not continues)
        return Conversation(self.format, messages, (*(self.ids if continues else ()), *ids), rendered, markers)

    def _spellings(self) -> Iterator[tuple[Message, ...]]:
        """Yield the messages, and then without whitespace around the last answer, which some templates write anew."""
        yield self.messages
        if self.ids and self.format.template is not None and self.messages[-1].role == "assistant":
            text = "".join(self.messages[-1].texts)
            if text != text.strip():
                yield (*self.messages[:-1], Message("assistant", (Text(text.strip()),)))

    def recall(self, text: str) -> Conversation:
        """Add an answer of which only the text is known, as the model wrote it, to a turn that was asked with markers
        absent from it.
        """
        message = Message("assistant", (Text(text),))
        shown = self.format.insert_markers(message, self.markers)
        ids = self.format.encode(shown, self.markers, is_start=False)
        rendered = self.format.append(self.rendered, message, self.markers)
        return replace(self, messages=(*self.messages, message), ids=(*self.ids, *ids), rendered=rendered)

    def answer(self, ids: Sequence[int], text: str, decode: Callable[[list[int]], str]) -> Conversation:
        """Add an answer of the model.

        Args:
            ids: that the model wrote, without a stop token.
            text: what the user saw of them; a stop string may have cut it.
            decode: turns token ids into text.
        """
        kept = len(ids)
        while not text.startswith(decode(list(ids[:kept]))):
            kept -= 1
        written = Message("assistant", (Text(decode(list(ids[:kept]))),))
        return replace(
            self,
            messages=(*self.messages, Message("assistant", (Text(text),))),
            ids=(*self.ids, *ids[:kept]),
            rendered=self.format.append(self.rendered, written, self.markers),
        )
