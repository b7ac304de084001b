"""`PromptWriter`: from a prompt to tokens, in the same way wherever a model answers or learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm_cli.errors import UsageError
from vlm_cli.prompt import Medium, Text
from vlm_cli.writing.conversation import ChatFormat, Conversation

if TYPE_CHECKING:
    from vlm_cli.processor import VLMProcessor

__all__ = ["PromptWriter"]


class PromptWriter:
    """Writes prompts for one model: as they stand, or as the turn of a user in the tokenizer's chat template.

    Args:
        processor: of the model.
        chat_template: write each prompt with the chat template.
        parse_special_tokens: read the spelling of a special token in a prompt as that token.

    Attributes:
        format: the chat template; None if prompts stay as they stand.

    Raises:
        UsageError: if the tokenizer has no chat template to write with.
    """

    def __init__(
        self, processor: VLMProcessor, *, chat_template: bool = False, parse_special_tokens: bool = False
    ) -> None:
        self.processor, self.parse_special_tokens = processor, parse_special_tokens
        self.format = ChatFormat(processor, parse_special_tokens=parse_special_tokens) if chat_template else None
        if self.format is not None and self.format.template is None:
            raise UsageError("the tokenizer of this model has no chat template. Leave out --chat-template.")

    def encode(self, parts: Sequence[Text | Medium]) -> list[int]:
        """Return the tokens of a prompt, up to where the answer begins."""
        if self.format is None:
            return self.processor.encode(parts, parse_special_tokens=self.parse_special_tokens)
        return list(Conversation(self.format).ask(parts).ids)

    @property
    def note(self) -> str | None:
        """What the user should know of the chat template, used or not; None if there is nothing to know."""
        if self.format is not None:
            return "Template: the tokenizer's chat template"
        if self.parse_special_tokens or self.processor.chat_program is None:
            return None
        return "Note: the tokenizer has a chat template, which `vlm chat` uses. --chat-template uses it here, too."
