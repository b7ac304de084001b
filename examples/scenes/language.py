"""A small LLaMA with random weights, and a tokenizer made for the texts about scenes.

Example: python -m examples.scenes.language OUT
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from examples.scenes.write import Series
from vlm_cli.prompt import Text, parse

__all__ = ["make", "make_tokenizer", "texts"]

MAX_VOCAB = 512  # tokens; training stops at 491, when each word is one
NUM_RECORDS = 1000  # to train the tokenizer on
BOS, EOS = "<s>", "</s>"


def texts(num: int = NUM_RECORDS) -> Iterator[str]:
    """What the first training records say, without their images."""
    for item in Series().items(num):
        turns = item.record.get("turns", [])
        yield "".join(part.text for part in parse(item.record["prompt"]) if isinstance(part, Text)) + "".join(
            turn["prompt"] + turn["completion"] for turn in turns
        )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; any text is a string of bytes, so nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    # Clean-up would turn " ." into "." and so lose spaces of the text.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def make(out: Path, *, seed: int = 0) -> Path:
    """Write a language model to `out` and return `out`; the same bytes each time."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,  # channels
        intermediate_size=320,  # channels inside the feed-forward
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,  # tokens
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # as LLaMA; the VLM adds one
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.scenes.language", description="Make a small language model with random weights."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="Directory to write.")
    parser.add_argument("--seed", type=int, default=0, help="Of the weights.")
    args = parser.parse_args()
    logging.disable_progress_bar()
    out = make(args.out, seed=args.seed)
    print(f"Wrote {out}. Next: vlm build OUT --language-model {out} …")


if __name__ == "__main__":
    main()
