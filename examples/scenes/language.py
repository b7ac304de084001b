"""A small LLaMA with random weights, and a tokenizer made for the texts about scenes.

Example: python -m examples.scenes.language OUT
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from examples import tiny_language_model
from examples.scenes.write import Series
from vlm_cli.prompt import Text, parse

__all__ = ["make", "make_tokenizer", "texts"]

NUM_RECORDS = 1000  # texts that train the tokenizer; it stops at 491 tokens, when each word is one token


def texts(num: int = NUM_RECORDS) -> Iterator[str]:
    """Yield the text of each of the first training records, without its images."""
    for item in Series().items(num):
        turns = item.record.get("turns", [])
        yield "".join(part.text for part in parse(item.record["prompt"]) if isinstance(part, Text)) + "".join(
            turn["prompt"] + turn["completion"] for turn in turns
        )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts of the first training records."""
    return tiny_language_model.make_tokenizer(texts())


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
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Seed for the random weights. Default: 0.")
    args = parser.parse_args()
    logging.disable_progress_bar()
    out = make(args.out, seed=args.seed)
    print(f"Wrote {out}. Next: vlm build OUT --language-model {out} …")


if __name__ == "__main__":
    main()
