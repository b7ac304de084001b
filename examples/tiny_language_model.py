"""Make a tiny untrained language model, offline.

The directory holds the files of a published language model (config, weights, byte-level BPE tokenizer), so
`vlm` takes it wherever it takes a language model. The model is untrained and writes noise. Like LLaMA, it has
no `<pad>` token; the VLM adds one.

Example: python examples/tiny_language_model.py tiny-lm
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

SEED = 0
MAX_VOCAB = 512  # tokens: 256 bytes, 2 special tokens, the rest are merges
BOS, EOS = "<s>", "</s>"

# Written for this file and dedicated to the public domain (CC0).
TEXT = """\
The cat sits on the mat and looks at the dog.
The dog sits on the grass and looks at the cat.
A small red cup of coffee stands on a wooden table.
There is a silver spoon beside the cup, and there are two cups on the shelf.
A rocket stands on the launch pad in the evening light.
An astronaut in an orange suit smiles at the camera.
Question: What is in the image? Answer: A cat and a dog.
Question: How many cups are on the table? Answer: One.
Question: What colour is the suit of the astronaut? Answer: Orange.
The image shows a blue sky above the green hills.
In the first image there is a cat, and in the second image there is a dog.
The video shows a person who walks along the street and opens a door.
"""


def make_tokenizer(lines: Iterable[str] = tuple(TEXT.splitlines())) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `lines`. Every text is a string of bytes, so no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    # Clean-up would turn " ." into "." and so lose spaces of the text.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def make(out: Path, *, model_type: str = "llama") -> Path:
    """Write a language model to `out` and return `out`; the same bytes each time.

    `model_type` is the type in Hugging Face's config.json, such as "llama". The function leaves the global random
    state as it was, so that a test may call it at any point.
    """
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=64,  # channels
        intermediate_size=128,  # channels inside the feed-forward
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,  # tokens
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a tiny untrained language model, offline.")
    parser.add_argument("out", type=Path, metavar="OUT", help="Directory to write, e.g. tiny-lm.")
    parser.add_argument(
        "--model-type",
        default="llama",
        metavar="TYPE",
        help="Type of the model in Transformers, e.g. llama, mistral, qwen2 or gpt2. Default: llama.",
    )
    args = parser.parse_args()
    logging.disable_progress_bar()
    out = make(args.out, model_type=args.model_type)
    print(
        f"Wrote {out}. Next: vlm build tiny-vlm --random-weights --family llava --vision-encoder ViT-S-32-alt "
        f"--language-model {out}"
    )
