"""The configuration of a language model, whose keys differ from type to type."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_cli.checkpoint.schemas.reading import read_file
from vlm_cli.checkpoint.schemas.rotary import BASE, ROPE, ROTARY_BASES
from vlm_cli.checkpoint.schemas.values import DTYPE, IDS, MOST_CHANNELS, MOST_LAYERS, ONE_ID
from vlm_cli.errors import CheckpointError, LanguageModelError, VLMError, explain_reading
from vlm_cli.schema import (
    ANYTHING,
    Kind,
    check,
    either,
    list_of,
    mapping,
    mapping_of,
    number,
    optional,
    show,
    text,
    truth,
    whole,
)

__all__ = ["check_sizes", "check_text_config", "check_text_config_file"]

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_WIDTHS = ("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_REQUIRED: dict[str, Kind] = {
    **dict.fromkeys(_DEPTHS, whole(1, MOST_LAYERS)),
    **dict.fromkeys(_WIDTHS, whole(1, MOST_CHANNELS)),
    **dict.fromkeys(_HEADS, whole(1, 100_000)),
}


def check_text_config(data: Any, where: str, key: str = "", error: type[VLMError] = LanguageModelError) -> None:
    """Check the configuration of a language model.

    Its keys differ from type to type: what a value must be follows from the default value that Transformers'
    configuration class of the type has for the key.

    Args:
        data: the configuration.
        where: how the message names the file.
        key: key of the configuration in the file; empty if it is the file.
        error: class of the error.

    Raises:
        VLMError: of the class `error`, naming the key.
    """
    kind = Kind("a mapping of keys to values", lambda x: isinstance(x, Mapping), _find_text_problems)
    check({key: data} if key else data, mapping({key: kind}) if key else kind, where, error)


def check_text_config_file(name: str, place: str, **keywords: Any) -> None:
    """Check config.json of a language model's directory or hub id; Transformers reports a missing one.

    Raises:
        LanguageModelError: naming the key.
    """
    try:
        data = read_file(place, "config.json", keywords)
    except CheckpointError as error:
        raise LanguageModelError(str(error)) from None
    if data is not None and "model_type" in data:
        check_text_config(data, f"config.json of language model {name!r}")


_COUNT_OF_LAYERS = re.compile(r"(^|_)(layers?|depth|blocks)$")
_COUNT_OF_CHANNELS = re.compile(r"(size|dim|width|heads|latents|queries)$|^n_embd$")


def check_sizes(data: Mapping[str, Any], where: str) -> None:
    """Check that no count of layers or channels in a configuration of another project is beyond all models.

    Args:
        data: the configuration; it may hold others.
        where: how the message names the file.

    Raises:
        CheckpointError: naming the key.
    """
    waiting: list[tuple[str, Any]] = [("", data)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{place}.{key}".lstrip("."), x) for key, x in value.items()]
        name = place.rpartition(".")[2]
        most = MOST_LAYERS if _COUNT_OF_LAYERS.search(name) else MOST_CHANNELS
        is_count = most == MOST_LAYERS or _COUNT_OF_CHANNELS.search(name)
        if is_count and isinstance(value, (int, float)) and value > most:
            raise CheckpointError(f"{where} is not valid: {place} must be at most {most:,}, but is {show(value)}.")


def _find_text_problems(data: Mapping[str, Any], key: str) -> Iterator[str]:
    prefix = f"{key}." if key else ""
    yield from text(most=100).find_problems(data.get("model_type"), f"{prefix}model_type")
    defaults = _defaults(data.get("model_type"))
    found = 0 if isinstance(data.get("model_type"), str) else 1
    for name, value in data.items():
        if name == "text_config" and isinstance(value, Mapping) and "model_type" in value:
            yield from _find_text_problems(value, f"{prefix}text_config")  # of a model that reads images itself
            continue
        problems = list(_text_kind(str(name), value, defaults).find_problems(value, f"{prefix}{str(name)[:60]}"))
        found += len(problems)
        yield from problems
    if not found and (problem := _problem_of_transformers(data, prefix)):
        yield problem


def _problem_of_transformers(data: Mapping[str, Any], prefix: str) -> str | None:
    """Let Transformers check a configuration; return a sentence that names the key, or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if data["model_type"] not in CONFIG_MAPPING:
        return None
    try:
        CONFIG_MAPPING[data["model_type"]].from_dict(dict(data))
    except Exception as error:
        named = re.search(r"field '(\w+)'", str(error))
        if named and named[1] in data:
            return (
                f"{prefix}{named[1]} is {show(data[named[1]])}, which a model of type {data['model_type']} cannot have."
            )
        return f"{prefix or 'the content'} does not fit a model of type {data['model_type']}: {explain_reading(error)}."
    return None


#: Names of settings that are a number of heads or channels.
_SIZES = re.compile(r"(_heads|head_dim|(hidden|intermediate|ffn|inner|embedding|embed|mlp)_(size|dim))$")


def _activation() -> Kind:
    """The name of an activation function that Transformers has."""
    from transformers.activations import ACT2FN

    words = f"an activation function, such as {', '.join(sorted(ACT2FN)[:8])}"
    return Kind(words, lambda value: isinstance(value, str) and value in ACT2FN)


def _defaults(model_type: Any) -> Mapping[str, Any]:
    """Return the default values of Transformers' configuration of a type; empty for an unknown type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from vlm_cli.quiet import quiet_libraries

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return {}
    try:
        with quiet_libraries():
            return CONFIG_MAPPING[model_type]().to_dict()
    except Exception:  # a class that cannot be made without arguments has no defaults to compare with
        return {}


def _text_kind(name: str, value: Any, defaults: Mapping[str, Any]) -> Kind:
    """Return what a key of a language model's configuration must hold."""
    default = defaults.get(name)
    if name in _REQUIRED and (type(default) is int or not defaults):
        return _REQUIRED[name]
    if name.endswith(("_eps", "epsilon")) and type(default) is float:
        return optional(number(0, 1, above=True))
    if name.endswith(("_eps", "epsilon")) and type(value) in (int, float):
        return number(0, 1)
    if name in ROTARY_BASES:
        return optional(either(BASE, list_of(BASE)))
    if name.endswith("_layers") and type(default) is int:
        return optional(either(whole(0, MOST_LAYERS), list_of(ANYTHING)))
    if name.endswith(("token_id", "token_ids")):
        return optional(IDS if name.startswith("eos") else ONE_ID if name.endswith("id") else ANYTHING)
    if name in ("dtype", "torch_dtype"):
        return optional(DTYPE)
    if name in ("hidden_act", "activation_function") and isinstance(default, str):
        return _activation()
    if _SIZES.search(name) and type(value) in (int, float):
        return whole(0, MOST_CHANNELS)
    if type(default) is bool:
        return optional(either(truth(), list_of(truth())))
    if type(default) is int:
        return optional(either(number(-(2**31), 2**40), list_of(ANYTHING)))
    if type(default) is float:
        return optional(either(number(-1e30, 1e30), list_of(ANYTHING)))
    if isinstance(default, str):
        return optional(text(most=10_000, empty=True))
    if isinstance(default, Mapping) and name in ("rope_parameters", "rope_scaling"):
        return optional(ROPE)
    if isinstance(default, Mapping):
        return optional(mapping_of(ANYTHING))
    if isinstance(default, (list, tuple)):
        return optional(list_of(ANYTHING))
    if type(value) in (int, float):
        return Kind("a finite number of at most 20 digits", lambda x: -1e20 <= x <= 1e20)
    return ANYTHING
