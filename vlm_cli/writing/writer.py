"""`PromptWriter`: from a prompt to tokens, in the same way wherever a model answers or learns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from vlm_cli.data.record import Segment
from vlm_cli.errors import UsageError
from vlm_cli.prompt import Medium, Text
from vlm_cli.templates.conversation import ChatFormat, Message
from vlm_cli.writing.choice import AUTO, TemplateChoice
from vlm_cli.writing.plain import PlainWriter

if TYPE_CHECKING:
    from vlm_cli.processor import VLMProcessor

__all__ = ["PromptWriter", "check_system"]


class PromptWriter:
    """Writes prompts for one model: as they stand, or as the turn of a user in the tokenizer's chat template.

    Args:
        processor: of the model; it gets the template of `choice`.
        choice: which prompts the template writes.
        system: what the model is told before each prompt; None for nothing.
        parse_special_tokens: read the spelling of a special token in a prompt as that token.

    Attributes:
        format: the chat template; None if no prompt is written with it.

    Raises:
        UsageError: if the tokenizer has no chat template to write with.
    """

    def __init__(
        self,
        processor: VLMProcessor,
        choice: TemplateChoice = AUTO,
        *,
        system: str | None = None,
        parse_special_tokens: bool = False,
    ) -> None:
        self.processor, self.choice, self.system = processor, choice, system
        self.parse_special_tokens = parse_special_tokens
        choice.give_to(processor)
        has_template = processor.chat_program is not None
        if choice.when == "all" and not has_template:
            raise UsageError("the tokenizer of this model has no chat template. Leave out --chat-template.")
        if system is not None:
            check_system(processor, choice)
        self.format = (
            ChatFormat(processor, parse_special_tokens=parse_special_tokens)
            if has_template and choice.when != "none"
            else None
        )

    @property
    def turn_format(self) -> ChatFormat:
        """How the turns of a chat are written: with the template, or plainly if no prompt is written with it."""
        return self.format or self._plain_format

    @cached_property
    def _plain_format(self) -> ChatFormat:
        return ChatFormat(self.processor, plain=True, parse_special_tokens=self.parse_special_tokens)

    def uses_template(self, *, is_turns: bool = False) -> bool:
        """Tell whether a prompt is written with the template.

        Args:
            is_turns: whether its row is an exchange of messages, and not a prompt.
        """
        return self.format is not None and (self.choice.when == "all" or is_turns or self.system is not None)

    def encode(
        self,
        parts: Sequence[Text | Medium],
        *,
        is_turns: bool = False,
        system: str | None = None,
        earlier: Sequence[Segment] = (),
        end_id: int | None = None,
    ) -> list[int]:
        """Return the tokens of a prompt, up to where the answer begins.

        Args:
            parts: of the prompt, in reading order.
            is_turns: whether the row of the prompt is an exchange of messages.
            system: what its row tells the model beforehand, in the place of what every prompt gets.
            earlier: the turns before, the user's first and an answer last.
            end_id: the token that ends an earlier answer of a row that is no exchange of messages.
        """
        said = self.system if system is None else system
        before = [_make_message(segment) for segment in earlier]
        if self.uses_template(is_turns=is_turns or system is not None):
            told, format = said, self.turn_format
        else:
            told, format = system, self._plain_format
            if earlier and not is_turns and system is None:
                assert end_id is not None
                plain = PlainWriter(self.processor, end_id, parse_special_tokens=self.parse_special_tokens)
                return plain.write([*earlier, Segment(tuple(parts), False)]).ids
        first = [] if told is None else [Message("system", (Text(told),))]
        return format.encode_messages([*first, *before, Message("user", tuple(parts))])

    @property
    def note(self) -> str | None:
        """What the user should know of the chat template, used or not; None if there is nothing to know."""
        if self.uses_template():
            return "Template: the tokenizer's chat template"
        if self.parse_special_tokens or self.processor.chat_program is None or self.choice.when == "none":
            return None
        return "Note: the tokenizer has a chat template, which `vlm chat` uses. --chat-template all uses it here, too."


def _make_message(turn: Segment) -> Message:
    """Return what the user says as it is, and an answer without whitespace at its ends."""
    if not turn.is_target:
        return Message("user", turn.parts)
    return Message("assistant", (Text("".join(x.text for x in turn.parts if isinstance(x, Text)).strip()),))


def plain_system(system: str | None) -> list[Text | Medium]:
    """Return how a row's system text stands before its prompt where no template writes it: on a line of its own."""
    return [] if system is None else [Text(f"{system}\n")]


def check_system(processor: VLMProcessor, choice: TemplateChoice, given: str = "--system") -> None:
    """Refuse a system text for a model whose prompts no template writes.

    Args:
        processor: of the model.
        choice: which prompts the template writes.
        given: what brings the text, for messages.

    Raises:
        UsageError: if no template writes it.
    """
    if choice.when == "none":
        raise UsageError(f"{given} is written by the chat template. Leave out {given} or --chat-template none.")
    if processor.chat_program is None:
        raise UsageError(
            f"the tokenizer of this model has no chat template, which would say where {given} stands. Write the text "
            "at the start of the prompt, or give a template: --chat-template FILE."
        )
