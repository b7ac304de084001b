"""`TemplateChoice`: what `--chat-template` says, the same for every command."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlm_cli.errors import UsageError
from vlm_cli.schema import show
from vlm_cli.text import decode_text

if TYPE_CHECKING:
    from vlm_cli.processor import VLMProcessor

__all__ = ["AUTO", "TemplateChoice"]

MAX_BYTES = 1 << 20  # of a file with a template; published ones have a few thousand


@dataclass(frozen=True)
class TemplateChoice:
    """Which prompts a chat template writes, and which template.

    Attributes:
        when: all prompts, none, or (auto) turns alone: rows of messages, and prompts with a system text. Other prompts
            stay as they stand.
        program: a template in the place of the tokenizer's own; None keeps that one.
        name: what the user typed.
    """

    when: Literal["auto", "all", "none"] = "auto"
    program: str | None = None
    name: str = "auto"

    @property
    def identity(self) -> str:
        """What a run depends on that is resumed: the words of the choice, or the file and its content."""
        if self.program is None:
            return self.name
        return f"{self.name} ({hashlib.sha256(self.program.encode()).hexdigest()[:12]})"

    @classmethod
    def parse(cls, text: str) -> TemplateChoice:
        """Read what the user typed: `auto`, `all`, `none`, or the name of a file with a template for all prompts.

        Raises:
            UsageError: if it is none of these, or if the file cannot be read.
        """
        for when in ("auto", "all", "none"):
            if text == when:
                return cls(when, None, text)
        path, choices = Path(text), "--chat-template expects auto, all, none or a file with a template"
        try:
            if not path.is_file():
                raise UsageError(f"{choices}, got {show(text)}, which is no file.")
            if path.stat().st_size > MAX_BYTES:
                raise UsageError(f"{choices}, and {show(text)} has more than {MAX_BYTES >> 20} MB.")
            return cls("all", decode_text(path.read_bytes()), text)
        except OSError as error:
            raise UsageError(f"cannot read the chat template {show(text)}: {error.strerror}.") from None
        except ValueError as error:
            raise UsageError(f"cannot read the chat template {show(text)}: it is {error}.") from None

    def give_to(self, processor: VLMProcessor) -> None:
        """Let a processor, and every directory to which it is written, have the template of the file."""
        if self.program is not None:
            processor.chat_template = processor.tokenizer.chat_template = self.program


AUTO = TemplateChoice()
