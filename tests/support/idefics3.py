"""Tiny Idefics3 and SmolVLM of Transformers' own classes, as published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.support.published import VOCABULARY, write_tokenizer
from tests.support.tiled import TiledCase
from tests.support.tiny import stir

TILE, PATCH, SHUFFLE = 32, 8, 2
FENCE = "<fake_token_around_image>"
PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]


def write_lines_tokenizer(folder: Path, *added: str) -> PreTrainedTokenizerFast:
    """Write a tokenizer whose last two words are one line feed and two, as one token each."""
    write_tokenizer(folder, *added, pad="<pad>")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"] |= {"\n": VOCABULARY - 2, "\n\n": VOCABULARY - 1}
    for name in (f"w{VOCABULARY - 2}", f"w{VOCABULARY - 1}"):
        del data["model"]["vocab"][name]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split(Regex("\n+"), "isolated")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast.from_pretrained(folder)


CLASSES: dict[str, Any] = {
    "idefics3": (Idefics3Config, Idefics3VisionConfig, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil),
    "smolvlm": (SmolVLMConfig, SmolVLMVisionConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil),
}


def make(
    folder: Path,
    kind: str = "smolvlm",
    *,
    is_tied: bool = False,
    shard: str = "5GB",
    edge: int = 96,
    tile: int = TILE,
    shuffle: int = SHUFFLE,
) -> TiledCase:
    config_class, vision_class, model_class, images_class = CLASSES[kind]
    tokenizer = write_lines_tokenizer(folder, "<global-img>", FENCE, *PLACES, "<image>", "<end_of_utterance>")
    config = config_class(
        vision_config=vision_class(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=tile,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer) + 3,  # rows are padded
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            tie_word_embeddings=is_tied,
            pad_token_id=tokenizer.pad_token_id,
        ),
        scale_factor=shuffle,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=is_tied,
    )
    theirs = stir(model_class(config), seed=5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    images = images_class(size={"longest_edge": edge}, max_image_size={"longest_edge": tile})
    images.save_pretrained(folder)
    # SmolVLM's own processor needs a package for numbers in words; of pictures it makes what Idefics3's does.
    processor = Idefics3Processor(images, tokenizer, image_seq_len=(tile // PATCH // shuffle) ** 2)
    return TiledCase(source=folder, model=theirs, processor=processor)
