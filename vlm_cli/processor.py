"""`VLMProcessor`: prompts and images to tensors, and tokens back to text.

B batch, T_txt tokens, T_img media per row, F frames per medium, C H W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

from PIL.Image import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from vlm_cli.chat_inputs import ChatText, encode_chat, load_media, split_batch
from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.decoding import HALF, decode
from vlm_cli.errors import LanguageModelError, PromptError, VLMWarning
from vlm_cli.image_processor import Frames, OpenCLIPImageProcessor
from vlm_cli.manifest import recording
from vlm_cli.media import MediaLoader
from vlm_cli.modeling.batching import pad_left, stack_pixels
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.fusion.cross_attention import VLMWithCrossAttention
from vlm_cli.modeling.fusion.language_stream import VLMWithLanguageStream
from vlm_cli.modeling.fusion.llama_cross_attention import VLMWithLlamaCrossAttention
from vlm_cli.modeling.vlm import VLM
from vlm_cli.prompt import Medium, Text, TokenBreak, parse
from vlm_cli.shim import PROCESSOR_CLASSES
from vlm_cli.templates.messages import read_messages
from vlm_cli.templates.pictures import PLAIN, leave_pictures_out
from vlm_cli.templates.standalone import make_template
from vlm_cli.trust import check_code

__all__ = ["VLMProcessor"]


class VLMProcessor(ProcessorMixin):
    """Turn text with `<image>` placeholders, and images, into the tensors that a VLM reads.

    >>> processor(text="<image>A photo of", images=[photo])  # doctest: +SKIP

    Only a placeholder becomes a media token. Text that spells a special token stays text, unless you pass
    `parse_special_tokens`. Write `\\<image>` for the text `<image>`.
    """

    def __init__(
        self,
        image_processor: OpenCLIPImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> VLMProcessor:  # type: ignore[override]
        """Load the processor of a directory or a hub id.

        See `ProcessorMixin.from_pretrained`. Code that the files name runs only with `trust_remote_code=True`.

        Raises:
            UntrustedCodeError: if a file asks for code that may not run.
        """
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
        check_code(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Write the files of the processor into a directory, and their records into its manifest, if it has one.

        The chat template in `chat_template.jinja` takes messages with pictures, for programs that know only this file.
        See `ProcessorMixin.save_pretrained`.
        """
        given = self.chat_template
        try:
            self.chat_template = make_template(self, videos=True)
        except LanguageModelError as error:
            warnings.warn(f"other programs get the chat template as it is: {error}", VLMWarning, stacklevel=2)
        try:
            with recording(save_directory, only_known=True):
                return super().save_pretrained(save_directory, **kwargs)
        finally:
            self.chat_template = given

    def to_dict(self) -> dict[str, Any]:
        """Return what `processor_config.json` holds.

        It names the class in the shim even where there is none: without that name, an `AutoProcessor` that does not
        know our class would load the tokenizer in its place.
        """
        return {**super().to_dict(), "auto_map": dict(PROCESSOR_CLASSES)}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Do nothing: Transformers would copy the module of this class into directories, in the place of the shim."""

    @property
    def media_token_id(self) -> int:
        """The id of `<image>`."""
        return self.tokenizer.convert_tokens_to_ids(MEDIA_TOKEN)

    @property
    def chat_program(self) -> str | None:
        """The chat template, a Jinja program: the processor's own, else the tokenizer's; None if there is none.

        It is the language model's, without what `save_pretrained` adds for other programs.
        """
        for found in (getattr(self, "chat_template", None) or None, self.tokenizer.chat_template):
            found = found.get("default") if isinstance(found, dict) else found
            template = leave_pictures_out(found) if found is not None else PLAIN
            if template != PLAIN:  # which a directory holds if the language model has none
                return template
        return None

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | Sequence[Sequence[Text | Medium]] | None = None,
        videos: Any = None,
        *,
        parse_special_tokens: bool = False,
        add_special_tokens: bool = True,
        padding_side: Literal["left", "right"] = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode prompts and preprocess their images.

        Args:
            images: for one text a list of media; for several texts a list of such lists. A medium is an image or a list
                of frames.
            videos: the clips for `<video>` placeholders, each a list of frames, in the same way; `images` are then
                those for `<image>`. Without `videos`, `images` holds the media for both, in reading order.
            text: a prompt, or several; instead of a string, each may be the parts that `vlm_cli.prompt.interleave`
                returns.
            parse_special_tokens: read text that spells a special token (`<|endofchunk|>`, chat markers) as the token.
            add_special_tokens: add the tokens with which the tokenizer starts a text. False says that the text has its
                special tokens already, as a chat template writes them: they are read as tokens, too.
            padding_side: where shorter rows are padded.
            kwargs: `max_length` with `truncation` is the most tokens of a row. Others are ignored; Transformers passes
                options that do not apply.

        Returns:
            `input_ids` and `attention_mask`, int[B, T_txt], and if there are media `pixel_values`
            float[B, T_img, F, C, H, W] and `vision_mask` bool[B, T_img, F], with `vision_grid` as `preprocess` of the
            image processor returns it.

        Raises:
            PromptError: if placeholders and media do not match, or if a row is too long.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        if texts and all(isinstance(x, ChatText) for x in texts):  # what `apply_chat_template` wrote
            ids = [x.ids for x in texts if isinstance(x, ChatText)]
            media = _media_of_rows(images, [row.count(self.media_token_id) for row in ids])
        else:
            rows = [_parts(x) for x in texts]
            media = _media_in_order(rows, images, videos)
            reads = parse_special_tokens or not add_special_tokens
            ids = [self.encode(row, parse_special_tokens=reads, add_special_tokens=add_special_tokens) for row in rows]
        input_ids, attention_mask = self._pad(ids, padding_side, **kwargs)
        data = {"input_ids": input_ids, "attention_mask": attention_mask}
        if any(media):
            data |= self.image_processor.preprocess(media)
        return BatchFeature(data)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        images: Any = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write conversations by the chat template: the tokens and pixels that `vlm chat` feeds for the same turns.

        See `ProcessorMixin.apply_chat_template` for the messages. The template runs in a process with limits. If there
        is none, an answer stands right behind its turn, and the next turn on a new line.

        Args:
            conversation: messages, or a list of such lists.
            chat_template: in the place of the processor's own.
            tools, documents, return_assistant_tokens_mask: are refused.
            add_generation_prompt: go on to where the model's answer begins.
            continue_final_message: the last message is the beginning of the model's answer.
            tokenize: return tokens and pixels, not a text.
            return_dict: with `tokenize`, return what `__call__` returns, and not the ids alone.
            images: pictures for parts that name none, in reading order; of several conversations, a list of lists.
            processor_kwargs: may hold `images`, and `padding_side`, `truncation` and `max_length` as of `__call__`.
            kwargs: ignored; Transformers passes options that do not apply.

        Returns:
            A text that `__call__` reads as the same tokens, or int[B, T_txt] ids, or a `BatchFeature`.

        Raises:
            PromptError: if the messages cannot be read, or a row is too long.
            MediaError: if a picture cannot be read.
            LanguageModelError: if the template cannot write the messages.
        """
        for name, given in (("tools", tools), ("documents", documents)):
            if given:
                raise PromptError(f"{name} are not possible: vlm writes messages alone. Leave {name} out.")
        if return_assistant_tokens_mask:
            raise PromptError("return_assistant_tokens_mask is not possible. `vlm train` learns answers alone.")
        conversations, is_batch = split_batch(conversation)
        options = {**(processor_kwargs or {})}
        images = options.pop("images", images)
        of_each = [[] for _ in conversations] if images is None else list(images) if is_batch else [list(images)]
        if len(of_each) != len(conversations):
            raise PromptError(f"{len(conversations)} conversations have {len(of_each)} lists of images.")
        loader = MediaLoader(allow_urls=True)
        texts, media = [], []
        for messages, given in zip(conversations, of_each, strict=True):
            loaded = load_media(read_messages(messages).media, given, loader) if tokenize else None
            texts.append(
                encode_chat(
                    self,
                    messages,
                    chat_template,
                    opens_answer=add_generation_prompt,
                    continues=bool(continue_final_message),
                    media=loaded,
                )
            )
            media.append([self.image_processor.read(x) for x in loaded or ()])
        if not tokenize:
            return texts if is_batch else texts[0]
        input_ids, attention_mask = self._pad([x.ids for x in texts], **options)
        if not return_dict:
            return input_ids
        pixels = stack_pixels(media) if any(media) else {}
        return BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask, **pixels})

    def _pad(
        self,
        rows: Sequence[list[int]],
        padding_side: str = "left",
        *,
        truncation: Any = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Pad rows of tokens to one length.

        Raises:
            PromptError: if a row would have to be cut, and with it perhaps a picture.
        """
        longest = max(map(len, rows), default=0)
        if truncation and max_length is not None and longest > max_length:
            raise PromptError(
                f"a row has {longest} tokens, and max_length is {max_length}. A row of vlm is never cut: its pictures "
                "belong to its tokens. Give a larger max_length, or None."
            )
        if padding_side == "left":
            return pad_left(rows, self.tokenizer.pad_token_id)
        ids, mask = pad_left([row[::-1] for row in rows], self.tokenizer.pad_token_id)
        return ids.flip(1), mask.flip(1)

    def encode(
        self, parts: Sequence[Any], *, parse_special_tokens: bool = False, add_special_tokens: bool = True
    ) -> list[int]:
        """Return the token ids of one prompt. Each part that is not a `Text` or a `TokenBreak` becomes a media token.

        The tokenizer reads the whole prompt at once: the tokens of a text depend on what stands before it, as in
        training. A media token ends every token, so this method also puts one where a token has to end, and removes it
        afterwards. With `I` for the media token, and the parts Text("a "), Medium, Text("<image>"):

            read       a I <Iimage>       the second I cuts the text `<image>` in two
            is real      I  no
            result     a I < image >

        Args:
            parts: in reading order.
            parse_special_tokens: read text that spells a special token as the token.
            add_special_tokens: add the tokens with which the tokenizer starts a text, such as `<s>`. Those with which
                some tokenizers end a text never stand in a prompt, which the model continues.

        Raises:
            PromptError: if a text is not valid Unicode.
        """
        text, is_real = "", list[bool]()  # is_real: for each media token in `text`, whether it stays
        for part in parts:
            if not isinstance(part, Text):
                text, is_real = text + MEDIA_TOKEN, [*is_real, not isinstance(part, TokenBreak)]
                continue
            pieces = part.text.split(MEDIA_TOKEN)
            text += f"{MEDIA_TOKEN[0]}{MEDIA_TOKEN}{MEDIA_TOKEN[1:]}".join(pieces)
            is_real += [False] * (len(pieces) - 1)
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise PromptError(f"the prompt holds bytes that are not UTF-8 text: {text[:60]!a}.")
        ids = self.tokenizer(
            text, split_special_tokens=not parse_special_tokens, add_special_tokens=add_special_tokens
        )["input_ids"]
        if add_special_tokens:
            ids = ids[: len(ids) - self._num_end_tokens()]
        keep = iter(is_real)
        media = self.media_token_id
        result = [i for i in ids if i != media or next(keep)]
        assert next(keep, None) is None, "the tokenizer lost a media token"
        return result

    def _num_end_tokens(self) -> int:
        """Count the tokens that the tokenizer puts behind each text."""
        if not self.tokenizer.num_special_tokens_to_add():
            return 0
        plain, whole = (self.tokenizer("a", add_special_tokens=x)["input_ids"] for x in (False, True))
        ends = (i + len(plain) for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return len(whole) - next(ends, len(whole))

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Turn token ids into text; see the tokenizer's `decode`. Bytes that are no character become U+FFFD."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        text = self.tokenizer.decode(ids, *args, **kwargs)
        if not isinstance(text, str) or HALF not in text or isinstance(ids, int):
            return text
        return decode(self.tokenizer, ids, *args[:1], **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Turn rows of token ids into texts; see the tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)


def _parts(text: Any) -> list[Any]:
    """Return a prompt's parts.

    Raises:
        PromptError: if a string has a placeholder with a file: a processor opens no file.
    """
    if not isinstance(text, str):
        return list(text)
    parts = parse(text)
    for part in parts:
        if isinstance(part, Medium):
            raise PromptError(
                f"the placeholder <{part.kind}:{part.source}> names a file, but a processor opens no file. "
                f"Write <{part.kind}>, and pass the {part.kind} in `{part.kind}s`."
            )
    return list(parts)


def _media_in_order(rows: Sequence[Sequence[Any]], images: Any, videos: Any) -> list[list[Frames]]:
    """Return the media of each row in reading order, each as a list of frames.

    Raises:
        PromptError: if a row has more or fewer media of a kind than placeholders.
    """
    kinds = [[getattr(part, "kind", "image") for part in row if not isinstance(part, Text)] for row in rows]
    if videos is None:
        return _media_of_rows(images, [len(row) for row in kinds])
    given = {"image": images, "video": videos}
    dealt = {kind: _media_of_rows(x, [row.count(kind) for row in kinds], kind) for kind, x in given.items()}
    left = [{kind: iter(dealt[kind][b]) for kind in given} for b in range(len(kinds))]
    return [[next(left[b][kind]) for kind in row] for b, row in enumerate(kinds)]


def _media_of_rows(images: Any, counts: Sequence[int], kind: str = "image") -> list[list[Frames]]:
    """Return the media of each row, each as a list of frames.

    A flat list of images is dealt out to the rows, to each as many as it has placeholders.

    Raises:
        PromptError: if a row has more or fewer media than placeholders.
    """
    images = [] if images is None else [images] if isinstance(images, Image) else list(images)
    if len(counts) == 1 and not (len(images) == 1 and _is_row(images[0], counts[0])):
        images = [images]
    elif images and all(isinstance(x, Image) for x in images):
        dealt = iter(images)
        rows = [list(islice(dealt, n)) for n in counts]
        images = [*rows, [*dealt]] if sum(counts) < len(images) else rows
    rows = [[[m] if isinstance(m, Image) else list(m) for m in row] for row in images] or [[] for _ in counts]
    if [len(row) for row in rows] != list(counts):
        given = [len(row) for row in rows]
        raise PromptError(f"the prompts have {list(counts)} <{kind}> placeholders, but {given} {kind}s were given.")
    return rows


def _is_row(value: Any, count: int) -> bool:
    """Say whether the only element of `images` is a row of media, and not one medium."""
    return isinstance(value, (list, tuple)) and (count != 1 or len(value) == 1)


def _register_with_transformers() -> None:
    """Tell Transformers' `Auto…` classes which classes the directory of a VLM needs."""
    AutoConfig.register(VLMConfig.model_type, VLMConfig)
    # A pipeline compares the name of a model's class with those that are registered here.
    classes = (VLM, VLMWithCrossAttention, VLMWithLlamaCrossAttention, VLMWithLanguageStream)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto._model_mapping.register(VLMConfig, classes)  # type: ignore[arg-type]
    # Transformers' server reads names of types and classes, for which there is no function that registers.
    for cls in classes:
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[cls.__name__] = cls.__name__
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[VLMConfig.model_type] = VLM.__name__
    AutoImageProcessor.register(
        VLMConfig, image_processor_classes=dict.fromkeys(("torchvision", "pil"), OpenCLIPImageProcessor)
    )
    AutoProcessor.register(VLMConfig, VLMProcessor)


_register_with_transformers()
