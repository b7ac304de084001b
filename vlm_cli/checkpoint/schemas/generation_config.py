"""generation_config.json: how a model answers unless it is told otherwise."""

from __future__ import annotations

from typing import Any

from vlm_cli.checkpoint.schemas.reading import read_file
from vlm_cli.checkpoint.schemas.values import IDS, MOST_CHANNELS, MOST_ID, ONE_ID
from vlm_cli.schema import check, mapping, number, optional, truth, whole

__all__ = ["check_generation_config"]

_GENERATION_CONFIG = mapping(
    {},
    {
        **dict.fromkeys(("bos_token_id", "pad_token_id"), optional(ONE_ID)),
        "eos_token_id": optional(IDS),
        **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), optional(whole(0, MOST_ID))),
        **dict.fromkeys(("num_beams", "num_return_sequences"), optional(whole(1, 1_000))),
        "num_beam_groups": optional(whole(1, 1_000)),
        "temperature": optional(number(0, 1_000)),
        "top_k": optional(whole(0, MOST_CHANNELS)),
        **dict.fromkeys(("top_p", "min_p", "typical_p"), optional(number(0, 1))),
        "repetition_penalty": optional(number(0, 1_000, above=True)),
        "length_penalty": optional(number(-1_000, 1_000)),
        "no_repeat_ngram_size": optional(whole(0, MOST_ID)),
        **dict.fromkeys(("do_sample", "use_cache", "output_attentions", "output_hidden_states"), optional(truth())),
    },
)


def check_generation_config(name: str, **keywords: Any) -> None:
    """Check generation_config.json of a directory or hub id, if it has one.

    Raises:
        CheckpointError: naming the key.
    """
    if (data := read_file(name, "generation_config.json", keywords)) is not None:
        check(data, _GENERATION_CONFIG, f"generation_config.json of {name!r}")
