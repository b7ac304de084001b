"""The tokens of the texts that a tiling puts around and between the views of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from vlm_cli.composition import Choice
from vlm_cli.errors import CompositionError
from vlm_cli.image_processor import OpenCLIPImageProcessor
from vlm_cli.processor import VLMProcessor
from vlm_cli.prompt import Slot, Text
from vlm_cli.tiling.texts import list_texts

__all__ = ["tokenize_texts"]


def tokenize_texts(
    tiling: Choice, preprocess: Mapping[str, Any], tokenizer: Tokenizer | None
) -> dict[str, list[int]] | None:
    """Turn each text that the tiling of a composition can need into tokens; None if it needs none.

    A special token that a text spells is read as that token. A text stands between views, so it is read as after a
    special token.

    Args:
        tiling: the composition's.
        preprocess: how the vision encoder's images are prepared.
        tokenizer: with the composition's added tokens; None if the language model has none.

    Raises:
        CompositionError: for texts without a tokenizer.
    """
    images = OpenCLIPImageProcessor(dict(preprocess))
    _, height, width = images.frame_shape
    texts = list_texts(tiling, (width, height))
    if not texts:
        return None
    if tokenizer is None:
        raise CompositionError(
            f"the tiling has texts, such as {texts[0]!r}, and the language model has no tokenizer that could read "
            "them. Name one: --set language_model.tokenizer=…"
        )
    processor = VLMProcessor(images, tokenizer)
    return {text: _tokenize(processor, text) for text in texts}


def _tokenize(processor: VLMProcessor, text: str) -> list[int]:
    parts = [Slot(), Text(text), Slot()]
    ids = processor.encode(parts, parse_special_tokens=True, add_special_tokens=False)
    start = ids.index(processor.media_token_id) + 1
    return ids[start : ids.index(processor.media_token_id, start)]
