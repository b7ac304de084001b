"""Prompts and images to tensors, and tokens back to text.

B batch, T_txt tokens, T_img media per row, F frames per medium, C H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseImageProcessor,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from vlm_cli.composition import MEDIA_TOKEN
from vlm_cli.errors import LanguageModelError, PromptError
from vlm_cli.modeling.batching import pad_left, stack_media
from vlm_cli.modeling.config import VLMConfig
from vlm_cli.modeling.vlm import VLM
from vlm_cli.prompt import Medium, Text, parse

__all__ = ["OpenCLIPImageProcessor", "Seam", "VLMProcessor", "add_tokens"]

Frames = Sequence[Image]


class Seam:
    """A part of a prompt that is nothing, between texts that must not spell a token together."""


class OpenCLIPImageProcessor(BaseImageProcessor):
    """The preprocessing that an OpenCLIP tower was trained with.

    Args:
        preprocess: OpenCLIP's `PreprocessCfg` as a dictionary: size in pixels, mean, std, interpolation, resize mode.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, preprocess: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.preprocess_config = preprocess or {}

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        data["preprocess"] = data.pop("preprocess_config")
        data.pop("_transform", None)
        return data

    def transform(self, image: Image) -> Tensor:
        """One frame to float[C, H, W]."""
        if not hasattr(self, "_transform"):
            from open_clip.transform import PreprocessCfg, image_transform_v2

            self._transform = image_transform_v2(PreprocessCfg(**self.preprocess_config), is_train=False)
        return self._transform(image)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a preprocessed frame."""
        size = self.preprocess_config.get("size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return 3, height, width

    def preprocess(self, images: Sequence[Sequence[Frames]], **kwargs: Any) -> BatchFeature:
        """Rows of media of frames.

        Returns:
            `pixel_values` float[B, T_img, F, C, H, W], zero at padding, and `vision_mask` bool[B, T_img, F], false
            there.
        """
        media = [[torch.stack([self.transform(frame) for frame in medium]) for medium in row] for row in images]
        pixels, mask = stack_media(media, shape=self.frame_shape)
        return BatchFeature({"pixel_values": pixels, "vision_mask": mask})

    __call__ = preprocess


class VLMProcessor(ProcessorMixin):
    """Text with `<image>` placeholders, and images, to what a VLM reads.

    >>> processor(text="<image>A photo of", images=[photo])  # doctest: +SKIP

    A medium token stands only where a placeholder is: text that spells a special token stays text, unless
    `parse_special_tokens` asks otherwise, and `<image>` that is meant as text is written `\\<image>`.
    """

    def __init__(
        self,
        image_processor: OpenCLIPImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def media_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(MEDIA_TOKEN)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | Sequence[Sequence[Text | Medium]] | None = None,
        *,
        parse_special_tokens: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: for one text a list of media; for several a list of such lists. A medium is an image, or a list of
                frames.
            text: a prompt, or several; or, for each, the parts that `vlm_cli.prompt.interleave` returns.
            parse_special_tokens: read the spelling of special tokens (`<|endofchunk|>`, chat markers) as the tokens.
            kwargs: ignored; Transformers passes options that have no meaning here.

        Returns:
            `input_ids` and `attention_mask`, int[B, T_txt], padded at the left, and if there are media `pixel_values`
            float[B, T_img, F, C, H, W] and `vision_mask` bool[B, T_img, F].

        Raises:
            PromptError: if placeholders and media do not match.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        rows = [_parts(x) for x in texts]
        media = _media_of_rows(images, [sum(not isinstance(p, Text) for p in row) for row in rows])
        ids = [self.encode(row, parse_special_tokens=parse_special_tokens) for row in rows]
        input_ids, attention_mask = pad_left(ids, self.tokenizer.pad_token_id)
        data = {"input_ids": input_ids, "attention_mask": attention_mask}
        if any(media):
            data |= self.image_processor.preprocess(media)
        return BatchFeature(data)

    def encode(
        self, parts: Sequence[Any], *, parse_special_tokens: bool = False, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of one prompt's parts; everything that is not a `Text` or a `Seam` becomes a media token.

        The tokenizer reads the prompt as a whole, so that what precedes a text shapes its tokens as in training.

        Args:
            parts: in reading order.
            parse_special_tokens: read the spelling of special tokens as the tokens.
            add_special_tokens: begin and end as the tokenizer does with a text of its own.
        """
        text, real = "", list[bool]()
        for part in parts:
            if not isinstance(part, Text):
                text, real = text + MEDIA_TOKEN, [*real, not isinstance(part, Seam)]
                continue
            # A literal `<image>` is cut in two by a media token, which is taken out again below.
            pieces = part.text.split(MEDIA_TOKEN)
            text += f"{MEDIA_TOKEN[0]}{MEDIA_TOKEN}{MEDIA_TOKEN[1:]}".join(pieces)
            real += [False] * (len(pieces) - 1)
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise PromptError(f"the prompt holds bytes that are not UTF-8 text: {text[:60]!a}.")
        ids = self.tokenizer(
            text, split_special_tokens=not parse_special_tokens, add_special_tokens=add_special_tokens
        )["input_ids"]
        keep = iter(real)
        media = self.media_token_id
        result = [i for i in ids if i != media or next(keep)]
        assert next(keep, None) is None, "the tokenizer lost a media token"
        return result

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)


def _parts(text: Any) -> list[Any]:
    """Parts of a prompt, whose placeholders must be bare if it is a string: text opens no file."""
    if not isinstance(text, str):
        return list(text)
    parts = parse(text)
    for part in parts:
        if isinstance(part, Medium):
            raise PromptError(
                f"the placeholder <image:{part.source}> names a file, which a processor does not open. "
                "Write <image>, and pass the image in `images`."
            )
    return list(parts)


def _media_of_rows(images: Any, counts: Sequence[int]) -> list[list[Frames]]:
    """Media of each row, each a list of frames; a flat list is dealt out by the rows' placeholders.

    Raises:
        PromptError: if a row has another number of placeholders than media.
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
        raise PromptError(
            f"the prompts have {list(counts)} <image> placeholders, but {[len(row) for row in rows]} images were given."
        )
    return rows


def _is_row(value: Any, count: int) -> bool:
    """Whether the only element of `images` is a list of media rather than a medium."""
    return isinstance(value, (list, tuple)) and (count != 1 or len(value) == 1)


def add_tokens(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], num_rows: int, first: int | None = None
) -> tuple[list[str], int]:
    """Give a tokenizer the tokens that a composition adds, and a pad token if it has none.

    Ids from the first added one on have rows of ours: those of `names` in their order, then the pad token. So have
    tokens of the tokenizer for which the language model has no row.

    Args:
        tokenizer: changed in place; its own special tokens stay.
        names: tokens to add.
        num_rows: rows of the language model's embedding.
        first: id of the first of them, where the tokenizer has them already.

    Returns:
        The tokens that have rows of ours, in the order of their ids, and the first of these ids.

    Raises:
        LanguageModelError: if the tokenizer cannot tell `<image>` from text, or has it elsewhere.
    """
    if first is None:
        first = min(len(tokenizer), num_rows)
    elif (media := tokenizer.get_vocab().get(MEDIA_TOKEN)) is None or media < first:
        raise LanguageModelError(
            f"the tokenizer has {MEDIA_TOKEN!r} at {media}, and the weights have it among the tokens from {first} on. "
            "Give the tokenizer that belongs to them: --set language_model.tokenizer=…"
        )
    else:
        _make_plain(tokenizer, MEDIA_TOKEN)
    for name in names:
        # Media tokens are not special, so that other special tokens can be read as text while they are not.
        special = name != MEDIA_TOKEN
        token = AddedToken(name, special=special, normalized=False, lstrip=False, rstrip=False)
        tokenizer.add_tokens([token], special_tokens=special)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is what is saved
    for trace in ("local_files_only", "is_local"):  # how it was found here says nothing of the next time
        tokenizer.init_kwargs.pop(trace, None)
    media = tokenizer.convert_tokens_to_ids(MEDIA_TOKEN)
    if tokenizer(f"a{MEDIA_TOKEN}", split_special_tokens=True, add_special_tokens=False)["input_ids"][-1:] != [media]:
        raise LanguageModelError(
            f"the tokenizer has a special token {MEDIA_TOKEN!r} of its own, which cannot be told from text. "
            "Give another tokenizer: --set language_model.tokenizer=…"
        )
    return tokenizer.convert_ids_to_tokens(list(range(first, len(tokenizer)))), first


def _make_plain(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Take the marks of a special token from one that the tokenizer has: other special tokens can then be read as text.

    An added token cannot be added again with other marks, so its entry is changed where the tokenizer is stored. Some
    tokenizers also have it under a name (`image_token`), by which it would be special again when they are loaded.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        stored = json.loads(backend.to_str())
        for token in stored["added_tokens"]:
            if token["content"] == name:
                token.update(special=False, normalized=False, lstrip=False, rstrip=False)
        tokenizer._tokenizer = type(backend).from_str(json.dumps(stored))
    for key in [key for key, token in tokenizer._special_tokens_map.items() if str(token) == name]:
        del tokenizer._special_tokens_map[key]
        tokenizer.SPECIAL_TOKENS_ATTRIBUTES = [x for x in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if x != key]
        for kept in (tokenizer.init_kwargs, tokenizer.init_kwargs.get("model_specific_special_tokens", {})):
            kept.pop(key, None)
    tokenizer._extra_special_tokens = [x for x in tokenizer._extra_special_tokens if str(x) != name]


# Transformers finds the classes of a directory's processor and model in these tables.
AutoConfig.register(VLMConfig.model_type, VLMConfig)
AutoModelForImageTextToText.register(VLMConfig, VLM)
AutoImageProcessor.register(
    VLMConfig, image_processor_classes=dict.fromkeys(("torchvision", "pil"), OpenCLIPImageProcessor)
)
AutoProcessor.register(VLMConfig, VLMProcessor)
