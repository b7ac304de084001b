"""Conversations as other programs write them, as the tokens and pixels that `vlm chat` feeds for the same turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from PIL.Image import Image

from vlm_cli.errors import PromptError
from vlm_cli.media import ChosenFrames, LoadedClip, LoadedImage, MediaLoader
from vlm_cli.prompt import Kind, Medium, Text
from vlm_cli.schema import show
from vlm_cli.templates.clip_text import add_clip_texts
from vlm_cli.templates.conversation import ChatFormat, Encoder, Message
from vlm_cli.templates.messages import ReadMessages, read_messages

__all__ = ["ChatText", "encode_chat", "load_media", "split_batch"]


class ChatText(str):
    """What a chat template writes, as text for people and for programs that pass it on to the processor.

    The processor reads `ids` and not the text, in which nobody could tell a placeholder from text that spells one.

    Attributes:
        ids: its tokens.
    """

    ids: list[int]

    def __new__(cls, text: str, ids: list[int]) -> ChatText:
        self = super().__new__(cls, text)
        self.ids = ids
        return self


def split_batch(conversation: Any) -> tuple[list[Any], bool]:
    """Return conversations, and whether the caller gave several; Transformers' pipelines give objects with messages."""
    if hasattr(conversation, "messages"):
        return [conversation.messages], False
    if isinstance(conversation, (list, tuple)) and conversation:
        first = conversation[0]
        if hasattr(first, "messages"):
            return [x.messages for x in conversation], True
        if isinstance(first, (list, tuple)):
            return list(conversation), True
    return [conversation], False


def encode_chat(
    processor: Encoder,
    conversation: Sequence[Mapping[str, Any]],
    template: str | None,
    *,
    opens_answer: bool,
    continues: bool,
    media: Sequence[LoadedImage | LoadedClip] | None = None,
) -> ChatText:
    """Write a conversation by the chat template, and encode it.

    Args:
        processor: of the model.
        conversation: its messages.
        template: in the place of the processor's own; a processor without one writes turns as lines.
        opens_answer: go on to where the answer begins.
        continues: the last message is the beginning of the answer.
        media: the pictures and clips, if the text around clips has to be written.

    Raises:
        PromptError, LanguageModelError: if the messages are none, or the template cannot write them.
    """
    read = read_messages(conversation)
    messages = _with_clip_texts(read, processor, media)
    begun: Message | None = None
    if continues:
        if messages[-1].role != "assistant":
            raise PromptError("continue_final_message goes on with an answer, but the last message is none.")
        *messages, begun = messages
    format = ChatFormat(processor, template)
    ids = format.encode_messages(messages, opens_answer=opens_answer, begun=begun)
    return ChatText(processor.tokenizer.decode(ids), ids)


def load_media(read: Sequence[tuple[Kind, Any]], given: Sequence[Any], loader: MediaLoader) -> list[Any]:
    """Return each picture and clip of a conversation: what its part names, or the next of those given apart.

    Raises:
        PromptError: if a part names nothing, and nothing is left.
        MediaError: if one cannot be read.
    """
    rest = iter(given)
    found = []
    for kind, source in read:
        if source is None:
            source = next(rest, None)
            if source is None:
                raise PromptError(f"a part of the type {kind!r} has no {kind}. Give its url, path, {kind} or base64.")
        found.append(_load(kind, source, loader))
    if left := sum(1 for _ in rest):
        raise PromptError(f"{left} more images were given than the messages have places for.")
    return found


def _load(kind: Kind, source: Any, loader: MediaLoader) -> LoadedImage | LoadedClip:
    if isinstance(source, str):
        return loader.load_medium(source, kind)
    if isinstance(source, Image) and kind == "image":
        return LoadedImage(source, "", *source.size)
    if kind == "video" and isinstance(source, Sequence) and source and all(isinstance(x, Image) for x in source):
        chosen = ChosenFrames(tuple(range(len(source))), None, None)
        return LoadedClip(tuple(source), "", source[0].width, source[0].height, chosen)
    if hasattr(source, "__fspath__"):
        return loader.load_medium(str(source), kind)
    raise PromptError(
        f"a part of the type {kind!r} holds {show(str(type(source)))}. Give a path, a URL or a PIL image."
    )


def _with_clip_texts(
    read: ReadMessages, processor: Encoder, media: Sequence[LoadedImage | LoadedClip] | None
) -> list[Message]:
    """Put the composition's text around each clip, if the clips are known."""
    if media is None or not any(isinstance(x, LoadedClip) for x in media):
        return read.messages
    names = (f"medium {i}" for i in range(len(media)))
    chosen: dict[str, ChosenFrames] = {}
    left = iter(media)

    def named(parts: Sequence[Any]) -> Iterator[Text | Medium]:
        for part in parts:
            if not isinstance(part, Medium):
                yield part
                continue
            name, medium = next(names), next(left)
            if isinstance(medium, LoadedClip):
                chosen[name] = medium.chosen
            yield Medium(name, part.kind)

    choose: Callable[[str], ChosenFrames] = chosen.__getitem__
    return [
        Message(message.role, tuple(add_clip_texts(list(named(message.parts)), processor, choose)))
        for message in read.messages
    ]
