"""Which settings of a language model's `generation_config.json` a VLM keeps.

Greedy decoding takes the most likely token at each step. Settings such as `min_new_tokens` or `no_repeat_ngram_size`
change that without a word, `stop_strings` needs a tokenizer that `generate` does not get, and Transformers writes no
file that sets `temperature` without `do_sample`. So a VLM keeps the settings that it knows, and tells of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import GenerationConfig

from vlm_cli.errors import LanguageModelError, first_line
from vlm_cli.schema import show

__all__ = ["inherit_checked", "inherit_settings"]

#: Settings that only sampling reads -> the value that has no effect.
_SAMPLING: Mapping[str, Any] = {
    "temperature": 1,
    "top_k": 50,
    "top_p": 1,
    "typical_p": 1,
    "min_p": None,
    "top_h": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}
#: Settings that only a search with beams reads -> the value that has no effect.
_BEAMS: Mapping[str, Any] = {"early_stopping": False, "length_penalty": 1}
_KEPT = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "suppress_tokens"),
        *("do_sample", "num_beams", "repetition_penalty", "max_length", "max_new_tokens", *_SAMPLING, *_BEAMS),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
        *("compile_config", "disable_compile", "continuous_batching_config", "low_memory", "return_dict_in_generate"),
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "transformers_version"),
    }
)
#: Other settings -> the value that has no effect, beside None, false, 0 and an empty list.
_NEUTRAL: Mapping[str, Any] = {
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
}
#: Settings of assisted decoding, which has no effect without an assistant.
_ASSISTANT = ("assistant_", "num_assistant_", "target_lookbehind", "is_assistant", "max_matching_ngram_size")


def inherit_settings(given: GenerationConfig) -> tuple[GenerationConfig, dict[str, Any]]:
    """Take the settings of a language model that a VLM keeps.

    Returns:
        A configuration that Transformers writes and reads, and the settings that were left out.
    """
    config = copy.deepcopy(given)
    left_out = {key: x for key, x in vars(config).items() if not _is_kept(config, key, x)}
    known = vars(GenerationConfig())
    for key in left_out:
        if key in known:
            setattr(config, key, None)
        else:
            delattr(config, key)
    return config, left_out


def _is_kept(config: GenerationConfig, key: str, value: Any) -> bool:
    """Say whether a VLM keeps a setting, or the setting has no effect."""
    if key == "do_sample":
        return not value or _samples(config)
    if key in _SAMPLING:
        return _samples(config) or value is None or value == _SAMPLING[key]
    if key in _BEAMS:
        return (config.num_beams or 1) > 1 or value is None or value == _BEAMS[key]
    if key in _KEPT or key.startswith(("_", *_ASSISTANT)):
        return True
    return not value or value == _NEUTRAL.get(key, value is None)


def _samples(config: GenerationConfig) -> bool:
    """Say whether a language model draws its tokens. A temperature of 0, which Transformers refuses, means greedy."""
    return config.do_sample is True and config.temperature != 0


def inherit_checked(given: GenerationConfig, name: str) -> tuple[GenerationConfig, tuple[str, ...]]:
    """Take the settings that a VLM keeps, and check that Transformers will write them.

    Args:
        given: of a language model or a checkpoint.
        name: its name, for messages.

    Returns:
        The settings, and sentences about those that were left out.

    Raises:
        LanguageModelError: for a value that Transformers refuses.
    """
    config, left_out = inherit_settings(given)
    config.pad_token_id = None  # a VLM has its own
    # Transformers' default of 20 tokens would count the prompt. The caller sets a length.
    config.max_length = None
    config.use_cache = True  # MPT's own configuration turns the cache off
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise LanguageModelError(
            f"generation_config.json of {name!r} is not valid: {first_line(error)} Correct the file, or delete it."
        ) from None
    return config, tuple(_describe(left_out, name))


def _describe(left_out: Mapping[str, Any], name: str) -> Iterator[str]:
    """Describe the settings that were left out, each kind in a sentence; those that Transformers ignores in none."""
    file, known = f"generation_config.json of {name!r}", vars(GenerationConfig())
    unused = {key: x for key, x in left_out.items() if key in _SAMPLING or key in _BEAMS or key == "do_sample"}
    others = {key: x for key, x in left_out.items() if key in known and key not in unused}
    if unused:
        yield f"{file} sets {_list(unused)}, which have no effect there: answers are greedy. vlm leaves them out."
    if others:
        yield f"{file} sets {_list(others)}. vlm leaves this out: greedy answers would no longer be greedy, or fail."


def _list(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={show(x)}" for key, x in settings.items())
