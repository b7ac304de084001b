"""The chat template that other programs read: it writes messages with pictures as `vlm chat` does, without vlm."""

from __future__ import annotations

from vlm_cli.templates.conversation import ChatFormat, Encoder
from vlm_cli.templates.pictures import PLAIN, take_pictures

__all__ = ["make_template"]


def make_template(processor: Encoder, *, videos: bool = False) -> str:
    """Return the template of a processor, or a plain one, extended by pictures and by what opens an answer.

    Args:
        processor: of the model.
        videos: write `<image>` for a clip, too.

    Raises:
        LanguageModelError: if the template cannot write even one message.
    """
    template = processor.chat_program
    if template is None:
        return take_pictures(PLAIN, {}, videos=videos)
    special = processor.tokenizer.special_tokens_map
    return take_pictures(template, special, videos=videos, heading=ChatFormat(processor).heading)
